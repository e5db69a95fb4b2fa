// The command line of a program: Abseil's flags, and a --help that lists all of them by subject.
#ifndef PREFILLD_PROTO_PROCESS_COMMAND_LINE_H_
#define PREFILLD_PROTO_PROCESS_COMMAND_LINE_H_

#include <string>
#include <vector>

namespace prefilld::process {

// Flags that --help shows together, by their names, in this order.
struct FlagGroup {
  const char* subject;
  std::vector<const char*> flags;
};

struct ProgramHelp {
  const char* usage;  // what the program is and how it is called
  std::vector<FlagGroup> groups;
};

// Sets the program's flags and returns its other arguments, the program's name first. Abseil ends
// the process with a message over an unknown flag or a value it cannot read. --help, -help and -h
// print HelpText and end it with status 0.
std::vector<char*> ParseCommandLine(int argc, char** argv, const ProgramHelp& help);

// Usage, then every flag that the program declares with its default and its meaning. Flags that no
// group names come last, under "Other".
std::string HelpText(const ProgramHelp& help);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_COMMAND_LINE_H_
