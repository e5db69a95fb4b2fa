// The ops of a decoder layer other than attention.
//
// Each op is one plain params struct. kernels/cpu implements `void <Op>(const <Op>Params&)` over
// fp32, kernels/cuda implements `cudaError_t Launch<Op>(const <Op>Params&, cudaStream_t)` over bf16
// with fp32 accumulation. An untyped pointer is a tensor in that *compute dtype*, in the memory of
// that device. Tensors are row-major and dense unless a stride is given. The axes' names are those
// of the whole project: num_tokens, num_heads (of queries), num_kv_heads, head_dim, hidden.
#ifndef PREFILLD_KERNELS_LAYER_OPS_H_
#define PREFILLD_KERNELS_LAYER_OPS_H_

#include <cstdint>

namespace prefilld::kernels {

// y[t] = table[ids[t]].
struct EmbeddingParams {
  const uint32_t* ids = nullptr;  // [num_tokens], each < rows of table
  const void* table = nullptr;    // [vocab_size, hidden]
  void* y = nullptr;              // [num_tokens, hidden]
  int64_t num_tokens = 0;
  int64_t hidden = 0;
};

// y = x / sqrt(mean(x^2) + epsilon) * weight, per token. y may be x.
struct RmsNormParams {
  const void* x = nullptr;       // [num_tokens, hidden]
  const void* weight = nullptr;  // [hidden]
  void* y = nullptr;             // [num_tokens, hidden]
  int64_t num_tokens = 0;
  int64_t hidden = 0;
  float epsilon = 1e-6f;
};

// y = x W^T + bias, or y += x W^T + bias when accumulate is set (the residual connection).
struct LinearParams {
  const void* x = nullptr;     // [num_tokens, in_features]
  const void* w = nullptr;     // [out_features, in_features], as Hugging Face stores it
  const void* bias = nullptr;  // [out_features], may be null
  void* y = nullptr;           // [num_tokens, out_features]
  int64_t num_tokens = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool accumulate = false;
};

// Takes the fused projection apart. It RMS-normalises each query and key head where the model does
// so (Qwen3), rotates queries and keys (RoPE in the halves convention of Hugging Face: element i
// pairs with i + head_dim / 2), and writes queries, keys and values in the layouts of attention and
// of the KV plane.
//
// Token t of the call has absolute position positions[t], or first_position + t where that is null.
// Angles are position * inv_freq[i] in double precision or equivalent, since a 1M-token prompt
// exhausts fp32. cos and sin are scaled by attention_factor (YaRN).
struct QkvRopeParams {
  const void* qkv = nullptr;           // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const void* q_norm = nullptr;        // [head_dim], null: no normalisation
  const void* k_norm = nullptr;        // [head_dim], null: no normalisation
  const float* inv_freq = nullptr;     // [head_dim / 2], device memory
  const int32_t* positions = nullptr;  // [num_tokens], device memory; null: first_position counts
  void* q = nullptr;                   // [num_tokens, num_heads, head_dim]
  void* k = nullptr;  // strided: kv head h, token t at h * kv_head_stride + t * kv_token_stride
  void* v = nullptr;  // as k
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  int64_t kv_head_stride = 0;   // elements
  int64_t kv_token_stride = 0;  // elements
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float attention_factor = 1.0f;
  float norm_epsilon = 1e-6f;
};

// y = silu(gate) * up.
struct SwiGluParams {
  const void* gate_up = nullptr;  // [num_tokens, 2 * intermediate]: gate, then up
  void* y = nullptr;              // [num_tokens, intermediate]
  int64_t num_tokens = 0;
  int64_t intermediate = 0;
};

// y = silu(x Wg^T) * (x Wu^T), which is Linear without bias and SwiGlu in one. The rows of w are
// those of gate, then those of up.
struct GatedLinearParams {
  const void* x = nullptr;  // [num_tokens, in_features]
  const void* w = nullptr;  // [2 * intermediate, in_features]
  void* gate_up = nullptr;  // [num_tokens, 2 * intermediate], scratch
  void* y = nullptr;        // [num_tokens, intermediate]
  int64_t num_tokens = 0;
  int64_t in_features = 0;
  int64_t intermediate = 0;
};

// Computes the log-probabilities (natural logarithm) that the logits of a row give to its target
// and to the likeliest token. Both are exactly equal when the target is the likeliest, or one of
// several.
struct TokenLogprobsParams {
  const void* logits = nullptr;       // [num_tokens, vocab_size]
  const uint32_t* targets = nullptr;  // [num_tokens], each < vocab_size
  float* logprobs = nullptr;          // [num_tokens]
  float* best_logprobs = nullptr;     // [num_tokens]
  int64_t num_tokens = 0;
  int64_t vocab_size = 0;
};

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_LAYER_OPS_H_
