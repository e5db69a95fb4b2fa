// Runs programs of this build through a shell, and checks what each of them must do with --help.
#ifndef PREFILLD_TESTS_PROTO_PROGRAM_RUN_H_
#define PREFILLD_TESTS_PROTO_PROGRAM_RUN_H_

#include <string>
#include <utility>

namespace prefilld {

// Returns the exit status of `command`, or -1 after a signal, and everything that it printed.
std::pair<int, std::string> RunCommand(const std::string& command);

// Expects that --help lists every flag that the program declares, as Abseil's own --helpfull tells
// them, with its default and help text, each under a subject, and ends with success.
void ExpectHelpListsEveryFlag(const std::string& program);

// Expects that OpenMP threads of the program sleep soon when they wait, and as an operator says if
// one does, by what libgomp tells of itself (proto/process/openmp_waiting.h).
void ExpectOpenMpThreadsSleep(const std::string& program);

}  // namespace prefilld

#endif  // PREFILLD_TESTS_PROTO_PROGRAM_RUN_H_
