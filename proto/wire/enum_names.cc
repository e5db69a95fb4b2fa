#include "proto/wire/enum_names.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace prefilld::wire {
namespace {

using google::protobuf::EnumDescriptor;
using google::protobuf::EnumValueDescriptor;

// The first value of every enum is <PREFIX>UNSPECIFIED, with the number 0.
std::string ShortName(const EnumValueDescriptor& value) {
  absl::string_view prefix = value.type()->value(0)->name();
  absl::ConsumeSuffix(&prefix, "UNSPECIFIED");
  absl::string_view name = value.name();
  absl::ConsumePrefix(&name, prefix);
  return absl::AsciiStrToLower(name);
}

}  // namespace

std::string EnumName(const EnumDescriptor& type, int value) {
  const EnumValueDescriptor* found = type.FindValueByNumber(value);
  return found == nullptr || found->number() == 0 ? "unknown" : ShortName(*found);
}

std::optional<int> EnumValue(const EnumDescriptor& type, absl::string_view name) {
  for (int i = 1; i < type.value_count(); ++i) {
    if (ShortName(*type.value(i)) == name) return type.value(i)->number();
  }
  return std::nullopt;
}

std::string EnumNames(const EnumDescriptor& type) {
  std::vector<std::string> names;
  for (int i = 1; i < type.value_count(); ++i) names.push_back(ShortName(*type.value(i)));
  return absl::StrJoin(names, ", ");
}

}  // namespace prefilld::wire
