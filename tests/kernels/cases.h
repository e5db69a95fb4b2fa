// The shapes with which the kernels of every device are tested.
#ifndef PREFILLD_TESTS_KERNELS_CASES_H_
#define PREFILLD_TESTS_KERNELS_CASES_H_

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/kv_pack.h"

namespace prefilld::kernels::testing {

// The kind of attention of a case's heads.
enum class Blocks {
  kDense,
  kDenseWithMass,
  kRandom,        // random bits, block 0 and the diagonal
  kDiagonalOnly,  // as sparse as a row may be
  kNoBits,        // rows of zeros: means the same
  kFull,          // every causal bit: equals dense
  kLastRow,       // random bits, the last row joined by another random set
  kPacked,        // prompts of unequal length and padding, each prompt seeing itself alone
  kMixed,         // dense, dense with mass and sparse heads in one call
};

// The queries are the last num_queries of num_keys positions.
struct AttentionCase {
  const char* name;
  int64_t num_queries;
  int64_t num_keys;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_tokens;
  Blocks blocks;
};

inline void PrintTo(const AttentionCase& c, std::ostream* out) { *out << c.name; }

// These cases have head_dim 64 and 128 with blocks of 64 and 128, which every device supports.
inline const std::vector<AttentionCase>& AttentionCases() {
  static const std::vector<AttentionCase> cases = {
      {"OneToken", 1, 1, 2, 1, 64, 128, Blocks::kDense},
      {"OneTokenMass", 1, 1, 2, 1, 64, 64, Blocks::kDenseWithMass},
      {"TwoTokens", 2, 2, 1, 1, 128, 128, Blocks::kDense},
      {"BelowABlock", 127, 127, 2, 2, 64, 128, Blocks::kDense},
      {"ExactlyABlock", 128, 128, 2, 2, 64, 128, Blocks::kDenseWithMass},
      {"AboveABlock", 129, 129, 2, 2, 64, 128, Blocks::kDenseWithMass},
      {"AboveASmallBlock", 65, 65, 2, 2, 128, 64, Blocks::kFull},
      {"Ratio4", 300, 300, 4, 1, 128, 128, Blocks::kDense},
      {"Ratio7", 200, 200, 14, 2, 64, 64, Blocks::kMixed},
      {"Ratio8", 260, 260, 8, 1, 128, 128, Blocks::kMixed},
      {"MassOfPartialBlocks", 391, 391, 4, 2, 64, 128, Blocks::kDenseWithMass},
      {"MassOfWideHeads", 515, 515, 2, 1, 128, 64, Blocks::kDenseWithMass},
      {"OffsetWithinABlock", 100, 333, 4, 2, 64, 128, Blocks::kMixed},
      {"OffsetAtABlock", 128, 384, 2, 1, 128, 128, Blocks::kDenseWithMass},
      {"OneQueryManyKeys", 1, 700, 4, 4, 64, 64, Blocks::kMixed},
      {"LastQueryWithinABlock", 1, 700, 4, 1, 128, 128, Blocks::kDense},
      {"LastQueryBeginsABlock", 1, 769, 4, 2, 128, 128, Blocks::kDense},
      {"LastQueryEndsABlock", 1, 768, 2, 2, 64, 128, Blocks::kDense},
      {"OffsetCrossingABlock", 130, 450, 2, 1, 128, 64, Blocks::kRandom},
      {"SparseRandom", 1000, 1000, 4, 2, 64, 64, Blocks::kRandom},
      {"SparseRandomWideHeads", 900, 900, 2, 1, 128, 128, Blocks::kRandom},
      {"SparseDiagonal", 640, 640, 2, 1, 64, 128, Blocks::kDiagonalOnly},
      {"SparseWithoutBits", 400, 700, 2, 1, 128, 128, Blocks::kNoBits},
      {"SmallBlocksWithoutBits", 2200, 2200, 1, 1, 64, 64, Blocks::kNoBits},
      {"SparseFullEqualsDense", 577, 577, 2, 2, 64, 128, Blocks::kFull},
      {"LastRowJoined", 700, 700, 4, 2, 128, 128, Blocks::kLastRow},
      {"OneFullPatternWord", 2048, 2048, 1, 1, 64, 64, Blocks::kRandom},
      {"TwoPatternWords", 2100, 2100, 2, 1, 64, 64, Blocks::kMixed},
      {"PackedPrompts", 1500, 1500, 8, 2, 128, 128, Blocks::kPacked},
      {"PackedPromptsSmallBlocks", 2200, 2200, 7, 1, 64, 64, Blocks::kPacked},
      {"PackedPromptsWideHeadsSmallBlocks", 1300, 1300, 4, 2, 128, 64, Blocks::kPacked},
      {"TwoPatternWordsOffset", 70, 4200, 2, 1, 128, 128, Blocks::kLastRow},
  };
  return cases;
}

// These head dimensions are supported by the CPU kernels only.
inline const std::vector<AttentionCase>& OtherHeadDimCases() {
  static const std::vector<AttentionCase> cases = {
      {"HeadDim16", 150, 150, 4, 2, 16, 64, Blocks::kMixed},
      {"HeadDim32", 150, 150, 4, 2, 32, 128, Blocks::kMixed},
      {"HeadDim80", 150, 150, 2, 1, 80, 128, Blocks::kDenseWithMass},
      {"HeadDim256", 150, 150, 2, 1, 256, 64, Blocks::kMixed},
  };
  return cases;
}

struct EstimateCase {
  const char* name;
  int64_t num_keys;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_tokens;
};

inline void PrintTo(const EstimateCase& c, std::ostream* out) { *out << c.name; }

inline const std::vector<EstimateCase>& EstimateCases() {
  static const std::vector<EstimateCase> cases = {
      {"OneToken", 1, 2, 1, 64, 128},         {"FewerThanABlock", 50, 2, 2, 64, 128},
      {"ExactlyABlock", 128, 2, 1, 128, 128}, {"AboveABlock", 129, 2, 1, 64, 128},
      {"SmallBlocks", 1000, 4, 2, 64, 64},    {"Ratio7", 777, 7, 1, 128, 128},
      {"ManyBlocks", 4500, 4, 1, 64, 128},    {"ManySmallBlocks", 2200, 2, 2, 128, 64},
  };
  return cases;
}

struct AntidiagonalCase {
  const char* name;
  int64_t num_queries;
  int64_t num_keys;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_tokens;
  int stride;
};

inline void PrintTo(const AntidiagonalCase& c, std::ostream* out) { *out << c.name; }

// The names say what is special about the lengths, in folds of the stride and in blocks.
inline const std::vector<AntidiagonalCase>& AntidiagonalCases() {
  static const std::vector<AntidiagonalCase> cases = {
      {"OneToken", 1, 1, 2, 1, 64, 128, 8},
      {"OneTokenLongFold", 1, 1, 1, 1, 128, 128, 16},
      {"FoldLessOne", 7, 7, 2, 2, 64, 128, 8},
      {"OneFold", 8, 8, 2, 1, 128, 128, 8},
      {"FoldAndOne", 9, 9, 2, 1, 64, 64, 8},
      {"FoldAndHalf", 12, 12, 2, 1, 64, 64, 8},
      {"FoldAndMoreThanHalf", 13, 13, 2, 1, 64, 64, 8},
      {"BlockLessOne", 127, 127, 2, 2, 64, 128, 8},
      {"OneBlock", 128, 128, 2, 1, 128, 128, 8},
      {"BlockAndOne", 129, 129, 2, 1, 64, 128, 8},
      {"SmallBlockAndOneLongFolds", 65, 65, 2, 1, 128, 64, 16},
      {"Ratio7", 777, 777, 7, 1, 128, 128, 8},
      {"Ratio4LongFolds", 1030, 1030, 8, 2, 64, 128, 16},
      {"SmallBlocks", 1000, 1000, 4, 2, 64, 64, 8},
      {"SmallBlocksLongFolds", 1500, 1500, 3, 3, 128, 64, 16},
      {"TilesAndOne", 2049, 2049, 2, 1, 64, 128, 8},
      {"TwoTiles", 4096, 4096, 2, 1, 128, 128, 8},
      {"TwoTilesAndABit", 4300, 4300, 3, 1, 64, 128, 8},
      {"OffsetAtABlock", 256, 1024, 2, 1, 128, 128, 8},
      {"OffsetAtAFold", 200, 1000, 4, 2, 64, 128, 8},
      {"OffsetWithinAFold", 203, 1001, 4, 2, 64, 128, 8},
      {"OffsetWithinALongFold", 501, 1203, 4, 1, 128, 128, 16},
      {"OneQuery", 1, 1000, 2, 2, 64, 64, 8},
      {"OneQueryBeginsAFold", 1, 1001, 2, 1, 128, 128, 8},
      {"FewQueriesWithinAFold", 3, 2046, 2, 1, 64, 128, 16},
      {"OffsetBeyondATile", 300, 4500, 2, 1, 128, 128, 8},
  };
  return cases;
}

struct PackCase {
  const char* name;
  int64_t num_tokens;
  int64_t first_block;
  int64_t num_blocks;
  int block_tokens;
  int num_kv_heads;
  int first_head;
  int num_heads;
  int head_dim;
};

inline void PrintTo(const PackCase& c, std::ostream* out) { *out << c.name; }

inline constexpr KvOrder kPackOrders[] = {KvOrder::kNhd, KvOrder::kHnd, KvOrder::kNh2d,
                                          KvOrder::kHn2d};

// Each case is run for all of kPackOrders and all wire dtypes.
inline const std::vector<PackCase>& PackCases() {
  static const std::vector<PackCase> cases = {
      {"OneToken", 1, 0, 1, 16, 2, 0, 2, 64},
      {"WholeBlocks", 64, 0, 4, 16, 2, 0, 2, 64},
      {"PartialLastBlock", 100, 0, 4, 32, 3, 0, 3, 128},
      {"SkipsAPrefix", 300, 3, 2, 64, 2, 0, 2, 64},
      {"OneHeadOfFour", 200, 1, 1, 128, 4, 2, 1, 128},
      {"TwoHeadsOfFour", 250, 0, 8, 32, 4, 1, 2, 64},
      {"BlocksPastTheEnd", 20, 0, 3, 16, 1, 0, 1, 64},
      {"EndsInTheMiddleOfManyHeads", 75, 1, 4, 16, 5, 1, 3, 64},
      {"OneLessThanABlock", 127, 0, 1, 128, 2, 0, 2, 128},
      {"OneMoreThanABlock", 33, 0, 2, 32, 1, 0, 1, 128},
  };
  return cases;
}

struct PagedCase {
  const char* name;
  int64_t num_keys;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_tokens;
};

inline void PrintTo(const PagedCase& c, std::ostream* out) { *out << c.name; }

// Each case is run for both orders of a cache block.
inline const std::vector<PagedCase>& PagedCases() {
  static const std::vector<PagedCase> cases = {
      {"OneKey", 1, 4, 2, 64, 16},         {"FifteenKeys", 15, 2, 2, 128, 16},
      {"SixteenKeys", 16, 4, 1, 64, 16},   {"SeventeenKeys", 17, 7, 1, 64, 16},
      {"Blocks32", 1000, 8, 1, 128, 32},   {"Blocks64", 2049, 8, 2, 64, 64},
      {"Blocks128", 5000, 14, 2, 64, 128}, {"ManyKeys", 20001, 2, 1, 64, 16},
  };
  return cases;
}

// Returns the name of a parameterised test.
template <typename Info>
std::string CaseName(const Info& info) {
  return info.param.name;
}

}  // namespace prefilld::kernels::testing

#endif  // PREFILLD_TESTS_KERNELS_CASES_H_
