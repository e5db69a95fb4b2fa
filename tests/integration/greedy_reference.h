// What the tokens must be: everything in one process, nothing sent, nothing paged.
#ifndef PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_
#define PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace prefilld::integration {

// Greedy tokens after `prompt`, on the CPU: the whole sequence is prefilled afresh, with dense
// attention, for every token, so that neither the decoder nor the KV plane has a part in it.
// Aborts when some token is no clear winner: a prompt like that tests nothing.
std::vector<uint32_t> GreedyReference(const std::string& checkpoint_dir,
                                      const std::vector<uint32_t>& prompt, int num_new_tokens);

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_GREEDY_REFERENCE_H_
