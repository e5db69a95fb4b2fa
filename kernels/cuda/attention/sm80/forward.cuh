// The portable attention kernel; config.h explains its tile sizes.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM80_FORWARD_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM80_FORWARD_CUH_

#include <cmath>

#include "kernels/cuda/attention/sm80/config.h"
#include "kernels/cuda/attention/sm80/tile.cuh"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/shared_address.cuh"
#include "kernels/cuda/launch.cuh"

namespace prefilld::kernels::cuda::sm80 {

// Finds the tile of a query block of the call and of a head of the group.
template <typename Config>
__device__ __forceinline__ QueryTile locate_tile(const KernelParams& params, int row, int work) {
  constexpr int kBlock = Config::kBlockTokens;
  const int64_t prefix = params.num_keys - params.num_queries;
  QueryTile tile;
  tile.row = row;
  tile.work = work;
  tile.kv_offset = static_cast<int64_t>(params.group.heads[work].head / params.heads_per_kv_head) *
                   params.kv_head_stride;
  tile.block = static_cast<int>(prefix / kBlock) + row;
  tile.first_query = static_cast<int64_t>(tile.block) * kBlock - prefix;
  tile.first_valid = tile.first_query < 0 ? static_cast<int>(-tile.first_query) : 0;
  const int64_t left = params.num_queries - tile.first_query;
  tile.end_valid = left < kBlock ? static_cast<int>(left) : kBlock;
  return tile;
}

// Writes the words of the tile's pattern row, up to the one with the diagonal. The whole CTA calls
// it.
__device__ __forceinline__ void load_pattern_row(uint32_t* words, const HeadWork& work,
                                                 const QueryTile& tile,
                                                 const KernelParams& params) {
  const int row_words = (params.row_key_blocks + 31) / 32;
  const bool last = tile.row == params.num_query_blocks - 1;
  for (int w = static_cast<int>(threadIdx.x); w <= tile.block / 32; w += blockDim.x) {
    uint32_t word = 0xffffffffu;
    if (work.pattern != nullptr) {
      word = work.pattern[static_cast<int64_t>(tile.row) * row_words + w];
      if (last && work.last_row != nullptr) word |= work.last_row[w];
    }
    if (w == tile.block / 32) {
      const uint32_t diagonal = 1u << (tile.block % 32);
      word = (word | diagonal) & (2 * diagonal - 1);
    }
    words[w] = word;
  }
}

// Walks the key tiles of a pattern row: blocks from the diagonal down, tiles within a block up. So
// from the first tile on, every row of the query tile has seen at least one key.
template <typename Config>
class KeyTiles {
 public:
  __device__ __forceinline__ KeyTiles(const uint32_t* words, int diagonal)
      : words_(words), word_index_(diagonal / 32), word_(words[diagonal / 32]) {
    next_block();
  }
  __device__ __forceinline__ bool done() const { return block_ < 0; }
  __device__ __forceinline__ int block() const { return block_; }
  __device__ __forceinline__ int part() const { return part_; }  // tile within the block
  __device__ __forceinline__ int first_key() const {
    return block_ * Config::kBlockTokens + part_ * Config::kKeyTile;
  }
  __device__ __forceinline__ void next() {
    if (++part_ == Config::kKeyTilesPerBlock) {
      part_ = 0;
      next_block();
    }
  }

 private:
  __device__ __forceinline__ void next_block() {
    while (word_ == 0) {
      if (--word_index_ < 0) {
        block_ = -1;
        return;
      }
      word_ = words_[word_index_];
    }
    const int bit = 31 - __clz(word_);
    word_ ^= 1u << bit;
    block_ = word_index_ * 32 + bit;
  }

  const uint32_t* words_;
  int word_index_;
  uint32_t word_;
  int block_ = -1;
  int part_ = 0;
};

// The softmax state and output of a warp's rows. State i is that of row 8 * i + lane / 4, counted
// from the warp's first row. Until the end a lane's sums are over its own columns only.
template <typename Config>
struct Accumulator {
  static constexpr int kRowTiles = Config::kRowTiles;
  static constexpr int kRows = 2 * kRowTiles;
  float out[kRowTiles][Config::kHeadDim / 8][4];
  float max[kRows];
  float sum[kRows];
  float block_sum[kRows];  // over the key block under way, for block mass

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
      block_sum[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kHeadDim / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
      }
    }
  }

  // Turns the logits of a key tile into probabilities relative to the new maximum and rescales
  // what was summed under the old one.
  __device__ __forceinline__ void absorb(float (&s)[kRowTiles][Config::kKeyTile / 8][4],
                                         float scale_log2) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int half = 2 * (i % 2);  // accumulator elements of this row: half, half + 1
      float tile_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < Config::kKeyTile / 8; ++j) {
        tile_max = fmaxf(tile_max, fmaxf(s[i / 2][j][half], s[i / 2][j][half + 1]));
      }
      const float new_max = fmaxf(max[i], device::quad_max(tile_max));
      const float rescale = device::exp2_approx((max[i] - new_max) * scale_log2);
      const float scaled_max = new_max * scale_log2;
      max[i] = new_max;
      float tile_sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Config::kKeyTile / 8; ++j) {
#pragma unroll
        for (int e = half; e < half + 2; ++e) {
          s[i / 2][j][e] = device::exp2_approx(s[i / 2][j][e] * scale_log2 - scaled_max);
          tile_sum += s[i / 2][j][e];
        }
      }
      sum[i] = sum[i] * rescale + tile_sum;
      if constexpr (Config::kBlockMass) block_sum[i] = block_sum[i] * rescale + tile_sum;
#pragma unroll
      for (int j = 0; j < Config::kHeadDim / 8; ++j) {
        out[i / 2][j][half] *= rescale;
        out[i / 2][j][half + 1] *= rescale;
      }
    }
  }

  // Adds P V over one key tile to `out`.
  __device__ __forceinline__ void multiply_pv(const float (&p)[kRowTiles][Config::kKeyTile / 8][4],
                                              uint32_t v_tile) {
    constexpr int kRowBytes = Config::kHeadDim * 2;
    const int lane = device::opaque(threadIdx.x) % 32;
    // V fragments: matrices 0 and 1 are keys 0-7 and 8-15 of columns 0-7; matrices 2 and 3 are the
    // same keys of columns 8-15.
    const uint32_t v_row = v_tile + (lane % 16) * kRowBytes;
    const uint32_t v_swizzle = ((lane / 16) ^ (lane % 8)) * 16;
#pragma unroll
    for (int step = 0; step < Config::kKeyTile / 16; ++step) {
      uint32_t p_fragment[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        device::to_operand_a(p[i][2 * step], p[i][2 * step + 1], p_fragment[i]);
      }
#pragma unroll
      for (int pair = 0; pair < Config::kHeadDim / 16; ++pair) {
        uint32_t v_fragment[4];
        device::load_matrix_x4_transposed(
            v_fragment, v_row + step * 16 * kRowBytes + step_offset(pair, v_swizzle));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          device::mma_m16n8k16(out[i][2 * pair], p_fragment[i], v_fragment[0], v_fragment[1]);
          device::mma_m16n8k16(out[i][2 * pair + 1], p_fragment[i], v_fragment[2], v_fragment[3]);
        }
      }
    }
  }

  // Writes log2 of each row's sum over the key block just finished to block_log_sums[row], and
  // begins the next block. Lane j of a quad writes the quad's row j, so that a warp writes 128
  // bytes at once.
  __device__ __forceinline__ void store_block_sums(float* block_log_sums, int first_row,
                                                   float scale_log2) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float total = device::quad_sum(block_sum[i]);
      const float log_sum = max[i] * scale_log2 + device::log2_approx(total);
      if (lane % 4 == i) mine = log_sum;
      block_sum[i] = 0.0f;
    }
    if (lane % 4 < kRows) {
      block_log_sums[first_row + 8 * (lane % 4) + device::accumulator_row(lane)] = mine;
    }
  }

  // Divides by the rows' sums, stores log2 of those sums in row_lse, and writes the rows that hold
  // queries to the output. They pass through q_tile, where this warp alone reads or writes its
  // rows.
  __device__ __forceinline__ void finish(uint32_t* q_tile, float* row_lse, int first_row,
                                         const QueryTile& tile, const KernelParams& params) {
    const int lane = device::opaque(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int half = 2 * (i % 2);
      const int row = first_row + 8 * i + device::accumulator_row(lane);
      const float total = device::quad_sum(sum[i]);
      if constexpr (Config::kBlockMass) {
        const bool valid = row >= tile.first_valid && row < tile.end_valid;
        if (lane % 4 == 0) {
          row_lse[row] = valid ? max[i] * params.scale_log2 + device::log2_approx(total) : INFINITY;
        }
      }
      const float inverse = 1.0f / total;
#pragma unroll
      for (int j = 0; j < Config::kHeadDim / 8; ++j) {
        q_tile[chunk_offset<Config::kHeadDim>(row, j) / 4 + lane % 4] =
            device::pack_bf16(out[i / 2][j][half] * inverse, out[i / 2][j][half + 1] * inverse);
      }
    }
    __syncwarp();
    constexpr int kChunks = Config::kHeadDim / 8;
    __nv_bfloat16* head_out =
        params.out + static_cast<int64_t>(params.group.heads[tile.work].head) * Config::kHeadDim;
    const int64_t row_stride = static_cast<int64_t>(params.num_heads) * Config::kHeadDim;
#pragma unroll
    for (int step = 0; step < 16 * kRowTiles * kChunks / 32; ++step) {
      const int row = first_row + (step * 32 + lane) / kChunks;
      const int chunk = lane % kChunks;
      if (row < tile.first_valid || row >= tile.end_valid) continue;
      const uint4 value =
          *reinterpret_cast<const uint4*>(q_tile + chunk_offset<Config::kHeadDim>(row, chunk) / 4);
      *reinterpret_cast<uint4*>(head_out + (tile.first_query + row) * row_stride + chunk * 8) =
          value;
    }
  }
};

// Masks the keys of a tile in the diagonal block that come after a row's own position.
template <typename Config>
__device__ __forceinline__ void mask_diagonal(
    float (&s)[Config::kRowTiles][Config::kKeyTile / 8][4], int first_row, int first_key) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < Config::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Config::kKeyTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + 16 * i + device::element_row(e) + device::accumulator_row(lane);
        const int key =
            first_key + 8 * j + device::accumulator_column(lane) + device::element_column(e);
        if (key > row) s[i][j][e] = -INFINITY;
      }
    }
  }
}

// The scratch memory in which this CTA keeps the logs of its rows' sums over a key block.
template <typename Config>
__device__ __forceinline__ float* block_log_sums(const KernelParams& params, int block) {
  return params.block_log_sums +
         (static_cast<int64_t>(blockIdx.x) * params.row_key_blocks + block) * Config::kBlockTokens;
}

// Computes the block mass of one query tile from the logs of its rows' block sums. Each warp takes
// one key block at a time.
template <typename Config>
__device__ __forceinline__ void write_block_mass(float* mass_row, const float* log_sums,
                                                 const float* row_lse, const QueryTile& tile,
                                                 int row_key_blocks) {
  constexpr int kBlock = Config::kBlockTokens;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const float weight = 1.0f / static_cast<float>(tile.end_valid - tile.first_valid);
  for (int block = warp; block < row_key_blocks; block += Config::kWarps) {
    float mass = 0.0f;
    if (block <= tile.block) {
#pragma unroll
      for (int row = lane; row < kBlock; row += 32) {
        mass += device::exp2_approx(log_sums[static_cast<int64_t>(block) * kBlock + row] -
                                    row_lse[row]);
      }
      mass = device::warp_sum(mass) * weight;
    }
    if (lane == 0) mass_row[block] = mass;
  }
}

// The number of the tile that this CTA takes in a turn. Tiles are numbered from the longest to the
// shortest. Where there are more tiles than CTAs, the CTAs take them in ascending order of CTA in
// even turns and in descending order in odd ones, so that all get about the same work.
__device__ __forceinline__ int64_t tile_of_turn(int64_t turn) {
  const int64_t grid = gridDim.x;
  const int64_t place = turn % 2 == 0 ? blockIdx.x : grid - 1 - blockIdx.x;
  return turn * grid + place;
}

// Computes the tile in shared.tile. `words` has room for its pattern row.
template <typename Config>
__device__ __forceinline__ void compute_tile(const KernelParams& params,
                                             SharedMemory<Config>& shared, uint32_t* words) {
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kThreads = Config::kThreads;
  const QueryTile& tile = shared.tile;
  const int first_row = static_cast<int>(threadIdx.x) / 32 * Config::kRowTiles * 16;
  const uint32_t q_tile = device::shared_address(shared.q);
  const uint32_t k_tile = device::shared_address(shared.k);
  const uint32_t v_tile = device::shared_address(shared.v);
  const HeadWork& work = params.group.heads[tile.work];
  const int64_t row_stride = static_cast<int64_t>(params.num_heads) * kHeadDim;
  load_tile_async<Config::kBlockTokens, kHeadDim, kThreads>(
      q_tile, params.q + tile.first_query * row_stride + static_cast<int64_t>(work.head) * kHeadDim,
      row_stride, tile.first_valid, tile.end_valid);
  load_pattern_row(words, work, tile, params);
  __syncthreads();  // the pattern row is written

  const auto load_key_tile = [&](uint32_t shared_tile, const __nv_bfloat16* source, int first_key) {
    load_tile_async<Config::kKeyTile, kHeadDim, kThreads>(
        shared_tile, source + (tile.kv_offset + static_cast<int64_t>(first_key) * kHeadDim),
        kHeadDim, 0, static_cast<int>(params.num_keys) - first_key);
    device::commit_async_copies();
  };

  Accumulator<Config> accumulator;
  accumulator.reset();
  KeyTiles<Config> tiles(words, tile.block);
  if (!tiles.done()) load_key_tile(k_tile, params.k, tiles.first_key());
  while (!tiles.done()) {
    device::wait_async_copies<0>();
    __syncthreads();  // K (and Q) are there, and all warps are done with the V before
    load_key_tile(v_tile, params.v, tiles.first_key());
    float s[Config::kRowTiles][Config::kKeyTile / 8][4];
    multiply_qk<kHeadDim, Config::kRowTiles, Config::kKeyTile>(s, q_tile, first_row, k_tile);
    const int block = tiles.block();
    if (block == tile.block) {
      mask_diagonal<Config>(s, first_row, tiles.part() * Config::kKeyTile);
    }
    tiles.next();
    device::wait_async_copies<0>();
    __syncthreads();  // V is there, and all warps are done with K
    if (!tiles.done()) load_key_tile(k_tile, params.k, tiles.first_key());
    accumulator.absorb(s, params.scale_log2);
    accumulator.multiply_pv(s, v_tile);
    if constexpr (Config::kBlockMass) {
      if (tiles.block() != block) {
        accumulator.store_block_sums(block_log_sums<Config>(params, block),
                                     device::opaque(threadIdx.x) / 32 * Config::kRowTiles * 16,
                                     params.scale_log2);
      }
    }
  }
  device::wait_async_copies<0>();
  accumulator.finish(reinterpret_cast<uint32_t*>(shared.q), shared.row_lse,
                     device::opaque(threadIdx.x) / 32 * Config::kRowTiles * 16, tile, params);
  if constexpr (Config::kBlockMass) {
    __syncthreads();  // row_lse and block_log_sums of all warps are written
    write_block_mass<Config>(params.group.heads[tile.work].block_mass +
                                 static_cast<int64_t>(tile.row) * params.row_key_blocks,
                             block_log_sums<Config>(params, 0), shared.row_lse, tile,
                             params.row_key_blocks);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, kCtasPerSm)
    attention_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  SharedMemory<Config>& shared = *reinterpret_cast<SharedMemory<Config>*>(shared_bytes);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared_bytes + sizeof(SharedMemory<Config>));

  const int64_t num_dense_tiles =
      static_cast<int64_t>(params.group.num_dense) * params.num_query_blocks;
  for (int64_t turn = 0; turn * gridDim.x < params.num_tiles; ++turn) {
    int64_t index = tile_of_turn(turn);
    if (index >= params.num_tiles) continue;
    if (turn > 0) __syncthreads();  // shared memory of the tile before is free
    // Dense heads come first. Within each kind the longest rows come first, and all heads of one
    // row together, so that heads of one KV head read the same keys at about the same time.
    int first_head = 0;
    int num_heads = params.group.num_dense;
    if (index >= num_dense_tiles) {
      index -= num_dense_tiles;
      first_head = params.group.num_dense;
      num_heads = params.group.num_heads - first_head;
    }
    // The tile's place is kept in shared memory, not in registers that the main loop needs.
    if (threadIdx.x == 0) {
      const int row = params.num_query_blocks - 1 - static_cast<int>(index / num_heads);
      shared.tile =
          locate_tile<Config>(params, row, first_head + static_cast<int>(index % num_heads));
    }
    __syncthreads();
    compute_tile<Config>(params, shared, words);
  }
}

template <typename Config>
cudaError_t LaunchForward(const KernelParams& params, int64_t grid, cudaStream_t stream) {
  const size_t shared_bytes =
      sizeof(SharedMemory<Config>) + PatternWords(params.row_key_blocks) * sizeof(uint32_t);
  return LaunchKernel(attention_kernel<Config>, static_cast<unsigned>(grid), Config::kThreads,
                      shared_bytes, stream, params);
}

}  // namespace prefilld::kernels::cuda::sm80

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM80_FORWARD_CUH_
