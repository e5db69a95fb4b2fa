#include "proto/process/command_line.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "absl/flags/commandlineflag.h"
#include "absl/flags/parse.h"
#include "absl/flags/reflection.h"
#include "absl/flags/usage.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace prefilld::process {
namespace {

constexpr size_t kLineWidth = 100;
constexpr absl::string_view kIndent = "      ";

// Tells whether a flag comes from Abseil, which declares a dozen in every program: --flagfile,
// --undefok and the like.
bool IsOfAbseil(const absl::CommandLineFlag& flag) {
  return absl::StrContains(flag.Filename(), "absl/flags/");
}

std::string DefaultOf(const absl::CommandLineFlag& flag) {
  const std::string value = flag.DefaultValue();
  if (flag.IsOfType<std::string>()) return absl::StrCat("default: \"", value, "\"");
  if (!value.empty()) return absl::StrCat("default: ", value);
  return flag.IsOfType<std::vector<std::string>>() ? "default: empty" : "default: not set";
}

void AppendWrapped(absl::string_view text, std::string& out) {
  size_t column = kLineWidth;
  for (const absl::string_view word : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    if (column + 1 + word.size() > kLineWidth) {
      absl::StrAppend(&out, "\n", kIndent, word);
      column = kIndent.size() + word.size();
    } else {
      absl::StrAppend(&out, " ", word);
      column += 1 + word.size();
    }
  }
}

void AppendFlag(const absl::CommandLineFlag& flag, std::string& out) {
  absl::StrAppend(&out, "\n  --", flag.Name(), "  (", DefaultOf(flag), ")");
  AppendWrapped(flag.Help(), out);
}

bool AsksForHelp(absl::string_view argument) {
  return argument == "--help" || argument == "-help" || argument == "-h";
}

// Tells whether the next argument is this one's value: it names a flag, other than a boolean one,
// and has no '='.
bool TakesNextArgument(absl::string_view argument) {
  if (!absl::ConsumePrefix(&argument, "-")) return false;
  absl::ConsumePrefix(&argument, "-");
  const absl::CommandLineFlag* flag = absl::FindCommandLineFlag(argument);
  return flag != nullptr && !flag->IsOfType<bool>();
}

bool HelpIsAsked(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const absl::string_view argument = argv[i];
    if (argument == "--") return false;
    if (AsksForHelp(argument)) return true;
    if (TakesNextArgument(argument)) ++i;
  }
  return false;
}

}  // namespace

std::string HelpText(const ProgramHelp& help) {
  std::map<std::string, const absl::CommandLineFlag*> left;
  for (const auto& [name, flag] : absl::GetAllFlags()) {
    if (!IsOfAbseil(*flag)) left.emplace(name, flag);
  }
  std::string text = absl::StrCat(help.usage, "\n");
  for (const FlagGroup& group : help.groups) {
    absl::StrAppend(&text, "\n", group.subject, ":");
    for (const char* name : group.flags) {
      const auto flag = left.extract(name);
      if (!flag.empty()) AppendFlag(*flag.mapped(), text);
    }
    text += '\n';
  }
  if (!left.empty()) {
    absl::StrAppend(&text, "\nOther:");
    for (const auto& [name, flag] : left) AppendFlag(*flag, text);
    text += '\n';
  }
  absl::StrAppend(&text, "\n--flagfile=FILE reads flags from a file, one a line.\n");
  return text;
}

std::vector<char*> ParseCommandLine(int argc, char** argv, const ProgramHelp& help) {
  if (HelpIsAsked(argc, argv)) {
    std::fputs(HelpText(help).c_str(), stdout);
    std::exit(EXIT_SUCCESS);
  }
  absl::SetProgramUsageMessage(help.usage);
  return absl::ParseCommandLine(argc, argv);
}

}  // namespace prefilld::process
