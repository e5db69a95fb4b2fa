#include "kernels/cuda/linear.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cuda/tuning.h"

namespace prefilld::kernels::cuda {
namespace {

// Prompts can have any length, and each needs plans of its own. A plan is small, but their number
// must have a limit.
constexpr size_t kMaxPlans = 512;

// The limits of Tune. Candidates that are far behind after the first round are left out. A slow GPU
// has time for fewer rounds, but for at least one.
constexpr int kMaxProposals = 8;
constexpr float kFarBehind = 1.25f;
constexpr float kMaxTuneMs = 1000.0f;

// Destroys an object that the library created. cuBLASLt's handles are pointers.
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

// Makes calls until one fails, and keeps that failure.
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
  std::vector<cublasLtMatmulAlgo_t> proposals;
  cublasLtMatmulAlgo_t algorithm = {};  // the one chosen
  bool tuned = false;
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

LaunchStatus LinearLauncher::Initialize(void* workspace, size_t workspace_bytes) {
  workspace_ = workspace;
  workspace_bytes_ = workspace_bytes;
  return cublasLtCreate(&handle_);
}

// The library's matrices are column-major. In its terms, y = x W^T is y' = W'^T x' over the same
// memory, with W' of shape [in, out], x' [in, tokens] and y' [out, tokens].
cublasStatus_t LinearLauncher::MakePlan(const LinearShape& shape, int max_proposals,
                                        std::unique_ptr<Plan>* result) const {
  auto plan = std::make_unique<Plan>();
  Preference preference;
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    return cublasLtMatmulDescSetAttribute(plan->product.get(), attribute, &value, sizeof(value));
  };
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof(value));
  };
  std::array<cublasLtMatmulHeuristicResult_t, kMaxProposals> proposals = {};
  int num_proposals = 0;
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
    return cublasLtMatmulAlgoGetHeuristic(
        handle_, plan->product.get(), plan->w.get(), plan->x.get(), plan->y.get(), plan->y.get(),
        preference.get(), max_proposals, proposals.data(), &num_proposals);
  });
  if (sequence.status() != CUBLAS_STATUS_SUCCESS) return sequence.status();
  for (int i = 0; i < num_proposals; ++i) {
    if (proposals[i].state == CUBLAS_STATUS_SUCCESS) plan->proposals.push_back(proposals[i].algo);
  }
  if (plan->proposals.empty()) return CUBLAS_STATUS_NOT_SUPPORTED;
  plan->algorithm = plan->proposals.front();
  *result = std::move(plan);
  return CUBLAS_STATUS_SUCCESS;
}

LinearLauncher::Plan& LinearLauncher::Keep(const LinearShape& shape, std::unique_ptr<Plan> plan) {
  if (plans_.size() >= kMaxPlans) {
    std::erase_if(plans_, [](const auto& entry) { return !entry.second->tuned; });
  }
  return *plans_.insert_or_assign(shape, std::move(plan)).first->second;
}

cublasStatus_t LinearLauncher::Run(const Plan& plan, const LinearParams& params,
                                   cudaStream_t stream) const {
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

LaunchStatus LinearLauncher::Launch(const LinearParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return {};
  const LinearShape shape = ShapeOf(params);
  const auto found = plans_.find(shape);
  if (found != plans_.end()) return Run(*found->second, params, stream);
  std::unique_ptr<Plan> plan;
  const cublasStatus_t status = MakePlan(shape, /*max_proposals=*/1, &plan);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  cublasLtMatmulHeuristicResult_t checked = {};
  if (const Plan* tuning = TuningFor(shape);
      tuning != nullptr &&
      cublasLtMatmulAlgoCheck(handle_, plan->product.get(), plan->w.get(), plan->x.get(),
                              plan->y.get(), plan->y.get(), &tuning->algorithm,
                              &checked) == CUBLAS_STATUS_SUCCESS &&
      checked.workspaceSize <= workspace_bytes_) {
    plan->algorithm = tuning->algorithm;
  }
  return Run(Keep(shape, std::move(plan)), params, stream);
}

const LinearLauncher::Plan* LinearLauncher::TuningFor(const LinearShape& shape) const {
  for (const auto& [tuned_shape, plan] : plans_) {
    LinearShape other_tokens = tuned_shape;
    other_tokens.num_tokens = shape.num_tokens;
    if (plan->tuned && other_tokens == shape &&
        TuningHolds(tuned_shape.num_tokens, shape.num_tokens)) {
      return plan.get();
    }
  }
  return nullptr;
}

bool LinearLauncher::IsTuned(const LinearShape& shape) const { return TuningFor(shape) != nullptr; }

LaunchStatus LinearLauncher::Tune(const LinearParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return {};
  const LinearShape shape = ShapeOf(params);
  std::unique_ptr<Plan> plan;
  LaunchStatus status = MakePlan(shape, kMaxProposals, &plan);
  if (!status.ok()) return status;
  const int repetitions =
      TuneRepetitions(params.num_tokens, params.in_features, params.out_features);

  using Algorithm = Candidate<cublasLtMatmulAlgo_t>;
  std::vector<Algorithm> candidates;
  for (const cublasLtMatmulAlgo_t& proposal : plan->proposals) candidates.push_back({proposal, {}});
  float spent_ms = 0.0f;
  for (int round = 0; round < kTuneRounds && (round == 0 || spent_ms < kMaxTuneMs); ++round) {
    float best_ms = std::numeric_limits<float>::max();
    for (Algorithm& candidate : candidates) {
      plan->algorithm = candidate.way;
      float ms = 0.0f;
      status = TimeLaunches([&]() -> LaunchStatus { return Run(*plan, params, stream); },
                            repetitions, stream, &ms);
      if (status.is_fault()) return status;
      if (!status.ok()) continue;  // this algorithm cannot run here, although it was proposed
      candidate.ms.push_back(ms);
      best_ms = std::min(best_ms, ms);
      spent_ms += ms;
    }
    if (round > 0) continue;
    std::erase_if(candidates, [best_ms](const Algorithm& candidate) {
      return candidate.ms.empty() || candidate.ms.front() > kFarBehind * best_ms;
    });
    if (candidates.empty()) return status;
  }
  float fastest_ms = std::numeric_limits<float>::max();
  for (const Algorithm& candidate : candidates) {
    const float ms = MedianMs(candidate.ms);
    if (ms >= fastest_ms) continue;
    fastest_ms = ms;
    plan->algorithm = candidate.way;
  }
  plan->tuned = true;
  Keep(shape, std::move(plan));
  return {};
}

}  // namespace prefilld::kernels::cuda
