// The names of the contract's enum values as people write them: ATTENTION_POLICY_VERTICAL_SLASH is
// "vertical_slash", DTYPE_BF16 is "bf16". They are read from the compiled contract, so a value that
// is added there has its name everywhere at once.
#ifndef PREFILLD_PROTO_WIRE_ENUM_NAMES_H_
#define PREFILLD_PROTO_WIRE_ENUM_NAMES_H_

#include <google/protobuf/descriptor.h>
#include <google/protobuf/generated_enum_reflection.h>

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

// Returns "unknown" for UNSPECIFIED, and for a value that a newer peer has added.
std::string EnumName(const google::protobuf::EnumDescriptor& type, int value);
// Returns the value of that name, or nullopt if there is none. UNSPECIFIED has no name.
std::optional<int> EnumValue(const google::protobuf::EnumDescriptor& type, absl::string_view name);
// Joins all names by commas, for messages and help.
std::string EnumNames(const google::protobuf::EnumDescriptor& type);

template <typename Enum>
std::string EnumName(Enum value) {
  return EnumName(*google::protobuf::GetEnumDescriptor<Enum>(), static_cast<int>(value));
}
template <typename Enum>
std::optional<Enum> EnumFromName(absl::string_view name) {
  const auto value = EnumValue(*google::protobuf::GetEnumDescriptor<Enum>(), name);
  if (!value.has_value()) return std::nullopt;
  return static_cast<Enum>(*value);
}
template <typename Enum>
std::string EnumNames() {
  return EnumNames(*google::protobuf::GetEnumDescriptor<Enum>());
}

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_ENUM_NAMES_H_
