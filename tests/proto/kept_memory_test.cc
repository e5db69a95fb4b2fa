#include "proto/process/kept_memory.h"

#include <sys/resource.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace prefilld::process {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kIsGlibcsAllocator = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kIsGlibcsAllocator = false;
#else
constexpr bool kIsGlibcsAllocator = true;
#endif
#else
constexpr bool kIsGlibcsAllocator = true;
#endif

int64_t PageFaultsOfThisThread() {
  rusage use = {};
  getrusage(RUSAGE_THREAD, &use);
  return use.ru_minflt;
}

constexpr size_t kBytes = size_t{128} << 20;  // more than one heap of a thread
constexpr int64_t kPages = kBytes >> 12;

// Returns the page faults of allocating kBytes in such pieces and writing them, after it has been
// done before.
int64_t FaultsOfReceivingAgain(size_t piece_bytes) {
  int64_t faults = 0;
  for (int round = 0; round < 5; ++round) {
    const int64_t before = PageFaultsOfThisThread();
    std::vector<std::unique_ptr<char[]>> pieces;
    for (size_t i = 0; i < kBytes / piece_bytes; ++i) {
      pieces.emplace_back(new char[piece_bytes]);
      std::memset(pieces.back().get(), round, piece_bytes);
    }
    faults = PageFaultsOfThisThread() - before;
  }
  return faults;
}

// One process cannot go back to glibc's defaults, so both are in one test.
TEST(KeptMemory, MemoryOfFreedFramesIsThereForTheNext) {
  if (!kIsGlibcsAllocator) GTEST_SKIP() << "a sanitizer's allocator is used";
  constexpr size_t kSlice = 64 << 10, kFrame = 2 << 20;
  const auto in_a_thread = [](size_t piece_bytes) {
    int64_t faults = 0;
    std::thread([&] { faults = FaultsOfReceivingAgain(piece_bytes); }).join();
    return faults;
  };
  EXPECT_GT(in_a_thread(kSlice), kPages / 4) << "glibc keeps it by itself";
  KeepFreedMemory();
  for (const size_t piece_bytes : {kSlice, kFrame}) {
    EXPECT_LT(FaultsOfReceivingAgain(piece_bytes), kPages / 100) << piece_bytes;
    EXPECT_LT(in_a_thread(piece_bytes), kPages / 100) << piece_bytes;
  }
}

}  // namespace
}  // namespace prefilld::process
