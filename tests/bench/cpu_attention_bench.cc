// Measures CPU attention at 8k tokens with 8 query heads over 2 KV heads of 64: dense, dense with
// block mass, and over a tenth of the blocks. Prints GFLOP/s of the two matrix products over the
// computed blocks, with the causal half of the diagonal. OMP_NUM_THREADS sets the threads.
#include <benchmark/benchmark.h>

#include "kernels/cpu/ops.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

constexpr int64_t kTokens = 8192;
constexpr int kHeads = 8;
constexpr int kKvHeads = 2;

void RunAttention(benchmark::State& state, int head_dim, Blocks blocks, double density) {
  const AttentionCase c = {"", kTokens, kTokens, kHeads, kKvHeads, head_dim, 128, blocks};
  AttentionData data(c);
  if (blocks == Blocks::kRandom) {
    for (int h = 0; h < kHeads; ++h) {
      const auto i = static_cast<size_t>(h);
      data.patterns[i] = MakePattern(data.num_query_blocks, data.num_key_blocks, density,
                                     static_cast<uint32_t>(h));
      data.work[i].pattern = data.patterns[i].data();
    }
  }
  int64_t computed = 0;
  for (int h = 0; h < kHeads; ++h) {
    for (uint32_t word : data.patterns[static_cast<size_t>(h)])
      computed += __builtin_popcount(word);
    if (blocks != Blocks::kRandom) computed += data.num_key_blocks * (data.num_key_blocks + 1) / 2;
  }
  // The diagonal blocks count half.
  const double blocks_done = static_cast<double>(computed) - 0.5 * kHeads * data.num_key_blocks;
  for (auto _ : state) cpu::Attention(data.params);
  state.counters["GFLOP/s"] = benchmark::Counter(blocks_done * 128 * 128 * head_dim * 4 / 1e9,
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void Dense(benchmark::State& state) {
  RunAttention(state, static_cast<int>(state.range(0)), Blocks::kDense, 1.0);
}
void DenseWithMass(benchmark::State& state) {
  RunAttention(state, static_cast<int>(state.range(0)), Blocks::kDenseWithMass, 1.0);
}
void TenthOfTheBlocks(benchmark::State& state) {
  RunAttention(state, static_cast<int>(state.range(0)), Blocks::kRandom, 0.1);
}

// A projection of the embedded model, from 512 to 1536 features, over 2048 tokens.
void Linear(benchmark::State& state) {
  const int64_t tokens = state.range(0), in = 512, out = 1536;
  std::vector<float> x(static_cast<size_t>(tokens * in), 0.5f);
  std::vector<float> w(static_cast<size_t>(out * in), 0.25f);
  std::vector<float> y(static_cast<size_t>(tokens * out));
  for (auto _ : state) {
    cpu::Linear({x.data(), w.data(), nullptr, y.data(), tokens, in, out, false});
  }
  state.counters["GFLOP/s"] = benchmark::Counter(2.0 * static_cast<double>(tokens * in * out) / 1e9,
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK(Dense)->Arg(64)->Arg(128)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(DenseWithMass)->Arg(64)->Arg(128)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(TenthOfTheBlocks)->Arg(64)->Arg(128)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(Linear)->Arg(1)->Arg(16)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace prefilld::kernels::testing

BENCHMARK_MAIN();
