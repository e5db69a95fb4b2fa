#include "proto/wire/port_file.h"

#include <cstdio>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace prefilld::wire {

absl::Status WritePortFile(const std::string& path, const Ports& ports) {
  if (path.empty()) return absl::OkStatus();
  const std::string draft = absl::StrCat(path, ".tmp");
  std::ofstream file(draft);
  file << "grpc=" << ports.grpc << "\nmetrics=" << ports.metrics << "\n";
  if (ports.kv_bench != 0) file << "kv_bench=" << ports.kv_bench << "\n";
  file.close();
  if (!file || std::rename(draft.c_str(), path.c_str()) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--port_file=", path, " cannot be written"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Ports> ReadPortFile(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (file == nullptr) return absl::UnavailableError(absl::StrCat(path, " is not there"));
  Ports ports;
  const int fields = std::fscanf(file, "grpc=%d metrics=%d kv_bench=%d", &ports.grpc,
                                 &ports.metrics, &ports.kv_bench);
  std::fclose(file);
  if (fields < 2) return absl::InvalidArgumentError(absl::StrCat(path, " is not a port file"));
  return ports;
}

}  // namespace prefilld::wire
