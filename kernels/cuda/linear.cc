#include "kernels/cuda/linear.h"

#include <algorithm>
#include <utility>

namespace prefilld::kernels::cuda {
namespace {

// Prompts of any length pass by; a plan is small, but their number must have a limit.
constexpr size_t kMaxPlans = 512;

// Frees what the library created. cuBLASLt's handles are pointers.
template <auto kDestroy>
struct Destroy {
  template <typename T>
  void operator()(T* pointer) const {
    kDestroy(pointer);
  }
};
using MatmulDesc = std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy<cublasLtMatmulDescDestroy>>;
using MatrixLayout =
    std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy<cublasLtMatrixLayoutDestroy>>;
using Preference =
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroy<cublasLtMatmulPreferenceDestroy>>;

// The first failure of a sequence of calls, which stops the rest.
class Sequence {
 public:
  template <typename Call>
  Sequence& Then(Call call) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = call();
    return *this;
  }
  cublasStatus_t status() const { return status_; }

 private:
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

cublasStatus_t MakeLayout(int64_t rows, int64_t columns, MatrixLayout* layout) {
  cublasLtMatrixLayout_t raw = nullptr;
  const cublasStatus_t status = cublasLtMatrixLayoutCreate(
      &raw, CUDA_R_16BF, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows);
  layout->reset(raw);
  return status;
}

uint32_t AlignmentOf(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(256, address == 0 ? 256 : address & -address));
}

}  // namespace

struct LinearLauncher::Plan {
  MatmulDesc product;
  MatrixLayout w;
  MatrixLayout x;
  MatrixLayout y;
  cublasLtMatmulAlgo_t algorithm = {};
};

LinearShape ShapeOf(const LinearParams& params) {
  LinearShape shape;
  shape.num_tokens = params.num_tokens;
  shape.in_features = params.in_features;
  shape.out_features = params.out_features;
  shape.alignment = std::min({AlignmentOf(params.x), AlignmentOf(params.w), AlignmentOf(params.y),
                              AlignmentOf(params.bias)});
  shape.bias = params.bias != nullptr;
  shape.accumulate = params.accumulate;
  return shape;
}

LinearLauncher::LinearLauncher() = default;

LinearLauncher::~LinearLauncher() {
  plans_.clear();
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

cublasStatus_t LinearLauncher::Initialize(void* workspace, size_t workspace_bytes) {
  workspace_ = workspace;
  workspace_bytes_ = workspace_bytes;
  return cublasLtCreate(&handle_);
}

// Row-major y = x W^T is, in the library's column-major terms, y' = W'^T x' with W' of shape
// [in, out], x' [in, tokens] and y' [out, tokens]: the same memory.
cublasStatus_t LinearLauncher::MakePlan(const LinearShape& shape,
                                        std::unique_ptr<Plan>* result) const {
  auto plan = std::make_unique<Plan>();
  Preference preference;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    return cublasLtMatmulDescSetAttribute(plan->product.get(), attribute, &value, sizeof(value));
  };
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof(value));
  };
  cublasLtMatmulHeuristicResult_t choice = {};
  int num_choices = 0;
  Sequence sequence;
  sequence
      .Then([&] {
        cublasLtMatmulDesc_t raw = nullptr;
        const auto status = cublasLtMatmulDescCreate(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F);
        plan->product.reset(raw);
        return status;
      })
      .Then([&] { return set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T); })
      .Then([&] {
        return set(CUBLASLT_MATMUL_DESC_EPILOGUE,
                   shape.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
      })
      .Then([&] { return MakeLayout(shape.in_features, shape.out_features, &plan->w); })
      .Then([&] { return MakeLayout(shape.in_features, shape.num_tokens, &plan->x); })
      .Then([&] { return MakeLayout(shape.out_features, shape.num_tokens, &plan->y); })
      .Then([&] {
        cublasLtMatmulPreference_t raw = nullptr;
        const auto status = cublasLtMatmulPreferenceCreate(&raw);
        preference.reset(raw);
        return status;
      })
      .Then([&] {
        return prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                      static_cast<uint64_t>(workspace_bytes_));
      })
      .Then([&] {
        // Products split over the features are to be added up in fp32, not in the output's bf16.
        return prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
      });
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    sequence.Then([&] { return prefer(attribute, shape.alignment); });
  }
  sequence.Then([&] {
    return cublasLtMatmulAlgoGetHeuristic(handle_, plan->product.get(), plan->w.get(),
                                          plan->x.get(), plan->y.get(), plan->y.get(),
                                          preference.get(), 1, &choice, &num_choices);
  });
  if (sequence.status() != CUBLAS_STATUS_SUCCESS) return sequence.status();
  if (num_choices == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  plan->algorithm = choice.algo;
  *result = std::move(plan);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t LinearLauncher::Launch(const LinearParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return CUBLAS_STATUS_SUCCESS;
  const LinearShape shape = ShapeOf(params);
  auto found = plans_.find(shape);
  if (found == plans_.end()) {
    if (plans_.size() >= kMaxPlans) plans_.clear();
    std::unique_ptr<Plan> plan;
    const cublasStatus_t status = MakePlan(shape, &plan);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    found = plans_.emplace(shape, std::move(plan)).first;
  }
  const Plan& plan = *found->second;
  if (params.bias != nullptr) {
    const cublasStatus_t status = cublasLtMatmulDescSetAttribute(
        plan.product.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &params.bias, sizeof(params.bias));
    if (status != CUBLAS_STATUS_SUCCESS) return status;
  }
  const float alpha = 1.0f;
  const float beta = params.accumulate ? 1.0f : 0.0f;
  return cublasLtMatmul(handle_, plan.product.get(), &alpha, params.w, plan.w.get(), params.x,
                        plan.x.get(), &beta, params.y, plan.y.get(), params.y, plan.y.get(),
                        &plan.algorithm, workspace_, workspace_bytes_, stream);
}

}  // namespace prefilld::kernels::cuda
