// The order in which the tiles of the output are computed.
//
// The CTAs that are at work at the same time share through L2 what they read, so their tiles should
// form about a square of the product. Tiles go down kGroupPairs pairs of token tiles and then on to
// the next column. So 66 clusters work on 16 token tiles and about 8 columns: 15 MB of x and 15 MB
// of w at 3584 features, of which x stays in L2 for the next columns. All of x would not stay: it
// is 59 MB at 8192 tokens.
#ifndef PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_TILE_ORDER_H_
#define PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_TILE_ORDER_H_

#include <cuda_runtime_api.h>

namespace prefilld::kernels::cuda::sm90::gated_linear {

// A cluster of two CTAs takes two token tiles, one above the other, of one column tile.
struct TileGrid {
  int num_pairs = 0;    // pairs of token tiles
  int num_columns = 0;  // column tiles
};

struct PairOfTiles {
  int pair = 0;
  int column = 0;
};

inline constexpr int kGroupPairs = 8;

// The tiles that come at place `index` of num_pairs * num_columns.
__host__ __device__ inline PairOfTiles PairNumber(const TileGrid& grid, int index) {
  const int group = index / (kGroupPairs * grid.num_columns);
  const int first = group * kGroupPairs;
  const int left = grid.num_pairs - first;
  const int pairs = left < kGroupPairs ? left : kGroupPairs;
  const int within = index - first * grid.num_columns;
  return {first + within % pairs, within / pairs};
}

}  // namespace prefilld::kernels::cuda::sm90::gated_linear

#endif  // PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_TILE_ORDER_H_
