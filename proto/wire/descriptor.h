#ifndef PREFILLD_PROTO_WIRE_DESCRIPTOR_H_
#define PREFILLD_PROTO_WIRE_DESCRIPTOR_H_

#include <unistd.h>

#include <utility>

namespace prefilld::wire {

// A file descriptor, closed on destruction. Move-only.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept { *this = std::move(other); }
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_DESCRIPTOR_H_
