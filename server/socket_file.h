#ifndef PREFILLD_SERVER_SOCKET_FILE_H_
#define PREFILLD_SERVER_SOCKET_FILE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/wire/descriptor.h"

namespace prefilld::server {

// A socket of shared memory in a folder. It was listened on before it had its name, so that whoever
// finds it is answered. Who may connect is up to the rights of the folder, and who may have
// anything from it up to keys. Removed on destruction.
class SocketFile {
 public:
  // Makes a socket of a new name in the folder, and removes those there that nobody serves any
  // more. The folder must belong to this process's user or to root, and nobody else may write there
  // but in a folder of which each user removes only what is their own (the sticky bit, as in /tmp):
  // whoever could take the socket's place would be shown keys. UNAVAILABLE: says why it cannot.
  static absl::StatusOr<std::unique_ptr<SocketFile>> Create(const std::string& folder);
  ~SocketFile();

  const std::string& path() const { return path_; }
  const wire::Descriptor& listener() const { return listener_; }

 private:
  SocketFile(std::string path, std::string name, wire::Descriptor folder,
             wire::Descriptor listener);

  const std::string path_;
  const std::string name_;  // in the folder
  const wire::Descriptor folder_;
  const wire::Descriptor listener_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SOCKET_FILE_H_
