// The tokens that are right: computed in one process, with nothing sent and nothing paged.
#ifndef PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_
#define PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace prefilld::integration {

// Returns the greedy tokens after `prompt`, on the CPU. For every token the whole sequence is
// prefilled afresh with dense attention, so neither the decoder nor the KV plane takes part. Aborts
// when the likeliest token leads by too little, because such a prompt tests nothing.
std::vector<uint32_t> GreedyReference(const std::string& checkpoint_dir,
                                      const std::vector<uint32_t>& prompt, int num_new_tokens);

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_
