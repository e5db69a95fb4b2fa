#include "tests/proto/program_run.h"

#include <algorithm>
#include <cstdio>
#include <regex>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace prefilld {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct DeclaredFlag {
  std::string name;
  std::string help;
  std::string default_value;
};

// Programs wrap their lines at different columns.
std::string OneLine(absl::string_view text) {
  return absl::StrJoin(absl::StrSplit(text, absl::ByAnyChar(" \n"), absl::SkipEmpty()), " ");
}

// Lists the flags that files outside Abseil declare.
std::vector<DeclaredFlag> DeclaredFlags(const std::string& program) {
  static const std::regex kFlag(R"(--([a-z0-9_]+) \((.*?)\); default: ?(.*?);(?= --|$))");
  std::vector<DeclaredFlag> flags;
  std::string help = RunCommand(program + " --helpfull").second;
  // The advice at the end would belong to the last file's flags. Which file is the last depends on
  // whether the compiler was given absolute paths.
  help.resize(std::min(help.size(), help.find("\nTry --helpfull")));
  const std::vector<std::string> files = absl::StrSplit(help, "Flags from ");
  for (size_t i = 1; i < files.size(); ++i) {
    const auto [path, text] =
        std::pair<std::string, std::string>(absl::StrSplit(files[i], absl::MaxSplits(":\n", 1)));
    if (absl::StrContains(path, "absl/flags/")) continue;
    const std::string line = OneLine(text);
    for (std::sregex_iterator at(line.begin(), line.end(), kFlag), end; at != end; ++at) {
      flags.push_back({(*at)[1], (*at)[2], (*at)[3]});
    }
  }
  return flags;
}

}  // namespace

std::pair<int, std::string> RunCommand(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.append(buffer, n);
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

void ExpectHelpListsEveryFlag(const std::string& program) {
  const auto [status, output] = RunCommand(program + " --help");
  EXPECT_EQ(status, 0);
  EXPECT_THAT(output, Not(HasSubstr("No flags matched")));
  EXPECT_THAT(output, Not(HasSubstr("\nOther:"))) << "a flag stands under no subject";
  const std::string text = OneLine(output);
  const std::vector<DeclaredFlag> flags = DeclaredFlags(program);
  EXPECT_GE(flags.size(), 4);
  for (const DeclaredFlag& flag : flags) {
    if (flag.default_value.empty()) {
      EXPECT_TRUE(
          absl::StrContains(text,
                            absl::StrCat("--", flag.name, " (default: not set) ", flag.help)) ||
          absl::StrContains(text, absl::StrCat("--", flag.name, " (default: empty) ", flag.help)))
          << flag.name;
    } else {
      EXPECT_THAT(text, HasSubstr(absl::StrCat("--", flag.name, " (default: ", flag.default_value,
                                               ") ", flag.help)));
    }
  }
  // The listing must have no flag twice, and none that the program does not declare.
  size_t listed = 0;
  for (size_t at = output.find("\n  --"); at != std::string::npos;
       at = output.find("\n  --", at + 1)) {
    ++listed;
  }
  EXPECT_EQ(listed, flags.size());
}

void ExpectOpenMpThreadsSleep(const std::string& program) {
  const std::string unset = "env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT OMP_DISPLAY_ENV=verbose ";
  EXPECT_THAT(RunCommand(unset + program + " --help").second, HasSubstr("GOMP_SPINCOUNT = '1000'"));
  EXPECT_THAT(RunCommand(unset + "GOMP_SPINCOUNT=77 " + program + " --help").second,
              AllOf(HasSubstr("GOMP_SPINCOUNT = '77'"), Not(HasSubstr("'1000'"))));
}

}  // namespace prefilld
