#include "server/socket_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"
#include "proto/wire/memory_socket_name.h"
#include "proto/wire/packet_socket.h"

namespace prefilld::server {
namespace {

constexpr char kUnnamed[] = ".new";  // the end of a socket's name until everybody may connect

absl::Status SystemFailure(const char* call) {
  return absl::UnavailableError(absl::StrCat(call, ": ", std::strerror(errno)));
}

// Opens the folder once. Everything else is done by that descriptor, so that it stays one folder.
absl::StatusOr<wire::Descriptor> OpenFolder(const std::string& path) {
  wire::Descriptor folder(open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  struct stat facts = {};
  if (!folder.valid() || fstat(folder.get(), &facts) != 0) return SystemFailure("open");
  if (facts.st_uid != geteuid() && facts.st_uid != 0) {
    return absl::UnavailableError(absl::StrCat("the folder belongs to user ", facts.st_uid, "; to ",
                                               geteuid(), ", who runs this, or to root"));
  }
  const bool others_write = (facts.st_mode & (S_IWGRP | S_IWOTH)) != 0;
  if (others_write && (facts.st_mode & S_ISVTX) == 0) {
    return absl::UnavailableError(
        absl::StrFormat("others may write in the folder (mode %03o), and take the socket's place",
                        facts.st_mode & 07777));
  }
  return folder;
}

// The name by which this process reaches a file of the folder, however long the folder's own is.
std::string PathIn(const wire::Descriptor& folder, const std::string& name) {
  return absl::StrCat("/proc/self/fd/", folder.get(), "/", name);
}

// Lets every user connect. A name could be made to lead elsewhere, so the file itself is taken hold
// of before its mode is changed.
absl::Status OpenToAll(const wire::Descriptor& folder, const std::string& name) {
  const wire::Descriptor file(openat(folder.get(), name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  struct stat facts = {};
  if (!file.valid() || fstat(file.get(), &facts) != 0) return SystemFailure("open");
  if (!S_ISSOCK(facts.st_mode) || facts.st_uid != geteuid()) {
    return absl::UnavailableError("another file has taken the socket's place");
  }
  if (chmod(absl::StrCat("/proc/self/fd/", file.get()).c_str(), 0666) != 0) {
    return SystemFailure("chmod");
  }
  return absl::OkStatus();
}

// Tells whether the server that makes a socket may not have come to listen on it.
bool IsYoung(const wire::Descriptor& folder, const std::string& name) {
  struct stat facts = {};
  if (fstatat(folder.get(), name.c_str(), &facts, AT_SYMLINK_NOFOLLOW) != 0) return true;
  return absl::TimeFromTimespec(facts.st_mtim) > absl::Now() - absl::Minutes(1);
}

// Removes the sockets of servers that are gone, be it before they had given them their names. One
// that is served has its name only since somebody listens on it.
void RemoveDeadSockets(const std::string& path, const wire::Descriptor& folder) {
  std::error_code error;
  const std::filesystem::directory_iterator end;
  for (std::filesystem::directory_iterator entry(PathIn(folder, "."), error);
       !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename();
    const bool is_unnamed = absl::EndsWith(name, kUnnamed);
    std::error_code ignored;
    if (!wire::IsMemorySocketFile(absl::StripSuffix(name, kUnnamed)) ||
        (is_unnamed && IsYoung(folder, name)) ||
        entry->symlink_status(ignored).type() != std::filesystem::file_type::socket) {
      continue;
    }
    const auto served = wire::PacketSocket::Connect(absl::StrCat("unix:", PathIn(folder, name)));
    if (absl::IsNotFound(served.status())) unlinkat(folder.get(), name.c_str(), 0);
  }
  if (!error) return;
  process::LogEvent(process::LogLevel::kWarning, "dead_sockets_not_removed",
                    {{"folder", path}, {"reason", error.message()}});
}

}  // namespace

SocketFile::SocketFile(std::string path, std::string name, wire::Descriptor folder,
                       wire::Descriptor listener)
    : path_(std::move(path)),
      name_(std::move(name)),
      folder_(std::move(folder)),
      listener_(std::move(listener)) {}

absl::StatusOr<std::unique_ptr<SocketFile>> SocketFile::Create(const std::string& folder_path) {
  PREFILLD_ASSIGN_OR_RETURN(wire::Descriptor folder, OpenFolder(folder_path));
  RemoveDeadSockets(folder_path, folder);
  const std::string name = wire::MemorySocketFile(wire::NewMemorySocketName());
  const std::string path = absl::StrCat(folder_path, "/", name);
  if (!wire::UnixSocketPath(absl::StrCat("unix:", path)).has_value()) {
    return absl::UnavailableError(absl::StrCat(
        path, " is no path of a socket: absolute, of plain characters, and short enough"));
  }
  const std::string unnamed = absl::StrCat(name, kUnnamed);
  PREFILLD_ASSIGN_OR_RETURN(wire::Descriptor listener,
                            wire::ListenForPackets(absl::StrCat("unix:", PathIn(folder, unnamed))));
  absl::Status status = OpenToAll(folder, unnamed);
  if (status.ok() && renameat(folder.get(), unnamed.c_str(), folder.get(), name.c_str()) != 0) {
    status = SystemFailure("rename");
  }
  if (!status.ok()) {
    unlinkat(folder.get(), unnamed.c_str(), 0);
    return status;
  }
  return std::unique_ptr<SocketFile>(
      new SocketFile(path, name, std::move(folder), std::move(listener)));
}

SocketFile::~SocketFile() { unlinkat(folder_.get(), name_.c_str(), 0); }

}  // namespace prefilld::server
