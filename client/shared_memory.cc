#include "client/shared_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "grpcpp/support/slice.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"
#include "proto/wire/memory_socket_name.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::SharedMemoryAttached;
using ::prefill::v1::SharedMemoryOffer;
using ::prefill::v1::SharedMemoryRequest;

// A server that says nothing for so long is not waited for: its KV comes over gRPC.
constexpr absl::Duration kServerPatience = absl::Seconds(3);
// A server has two; nobody is called at more, whatever an offer says.
constexpr int kMostSockets = 4;

MemoryBudget& BudgetOfProcess() {
  static MemoryBudget& budget = *new MemoryBudget(SharedMemory::kMostBytes);
  return budget;
}

// Returns what a call can use, and no more than there can be.
size_t UsefulBytes(const SharedMemoryOffer& offer) {
  return static_cast<size_t>(std::min<uint64_t>(offer.bytes(), SharedMemory::kMostBytes));
}

struct Connection {
  std::string address;
  wire::PacketSocket socket;
};

// Only a socket of a server of this machine is called, and no other program's.
absl::Status CheckAddress(const std::string& address, const SharedMemoryOffer& offer) {
  if (!wire::IsMemorySocketAddress(address)) {
    return absl::UnavailableError(
        absl::StrCat("an address that no server's socket has: ", address.substr(0, 128)));
  }
  if (!wire::IsOfThisBoot(offer.network())) {
    return absl::UnavailableError(absl::StrCat(address, ": of another machine"));
  }
  if (absl::StartsWith(address, "unix-abstract:") &&
      offer.network() != wire::NetworkOfThisProcess()) {
    return absl::UnavailableError(absl::StrCat(address, ": of another network namespace"));
  }
  return absl::OkStatus();
}

// Returns the addresses that are there, in the order of the offer, or why there are none.
absl::StatusOr<std::vector<std::string>> AddressesHere(const SharedMemoryOffer& offer) {
  absl::Status reason = absl::NotFoundError("the server offers no shared memory");
  if (offer.bytes() == 0) return reason;
  std::vector<std::string> addresses;
  for (int i = 0; i < std::min(offer.sockets_size(), kMostSockets); ++i) {
    const std::string& address = offer.sockets(i);
    absl::Status status = CheckAddress(address, offer);
    const auto path = wire::UnixSocketPath(address);
    if (status.ok() && path.has_value() && access(path->c_str(), F_OK) != 0) {
      status = absl::UnavailableError(absl::StrCat(address, ": ", std::strerror(errno)));
    }
    if (status.ok()) {
      addresses.push_back(address);
    } else {
      reason = std::move(status);
    }
  }
  if (addresses.empty()) return reason;
  return addresses;
}

absl::StatusOr<Connection> ConnectToAny(const std::vector<std::string>& addresses) {
  absl::Status reason;
  for (const std::string& address : addresses) {
    auto socket = wire::PacketSocket::Connect(address);
    if (socket.ok()) return Connection{address, *std::move(socket)};
    reason = absl::UnavailableError(absl::StrCat(address, ": ", socket.status().message()));
  }
  return reason;
}

}  // namespace

// The memory is made first, because a server does not wait long for one that has connected.
absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemory::Attach(const Accepted& accepted) {
  const SharedMemoryOffer& offer = accepted.shared_memory();
  PREFILLD_ASSIGN_OR_RETURN(const auto addresses, AddressesHere(offer));
  const size_t bytes = UsefulBytes(offer);
  PREFILLD_ASSIGN_OR_RETURN(MemoryBudget::Share share, BudgetOfProcess().Take(bytes));
  PREFILLD_ASSIGN_OR_RETURN(const wire::Descriptor memory, wire::MakeSealedMemory(bytes));
  PREFILLD_ASSIGN_OR_RETURN(wire::Mapping mapping, wire::Mapping::Map(memory, bytes, PROT_READ));
#ifdef MADV_POPULATE_READ
  // Frames are read without a page fault then. Where it is unknown, each page has one.
  madvise(mapping.data(), bytes, MADV_POPULATE_READ);
#endif
  PREFILLD_ASSIGN_OR_RETURN(Connection connection, ConnectToAny(addresses));
  std::unique_ptr<SharedMemory> attached(new SharedMemory(std::move(connection.address),
                                                          std::move(connection.socket),
                                                          std::move(share), std::move(mapping)));
  PREFILLD_RETURN_IF_ERROR(attached->Introduce(accepted, &memory));
  return attached;
}

absl::Status SharedMemory::AttachAgain(const Accepted& accepted) {
  {
    absl::MutexLock lock(&begin_mu_);
    has_begun_ = false;
  }
  return Introduce(accepted, nullptr);
}

absl::Status SharedMemory::Introduce(const Accepted& accepted, const wire::Descriptor* memory) {
  SharedMemoryRequest request;
  request.mutable_attach()->set_request_id(accepted.request_id());
  request.mutable_attach()->set_receiver(accepted.receiver());
  request.mutable_attach()->set_key(accepted.shared_memory().key());
  request.mutable_attach()->set_bytes(mapping_.bytes());
  PREFILLD_RETURN_IF_ERROR(
      socket_.Send(request, kServerPatience, memory == nullptr ? -1 : memory->get()));
  SharedMemoryAttached answer;
  PREFILLD_RETURN_IF_ERROR(socket_.Receive(answer, kServerPatience));
  return absl::Status(static_cast<absl::StatusCode>(answer.code()), answer.message());
}

bool SharedMemory::Suits(const SharedMemoryOffer& offer) const {
  return is_heard() && mapping_.bytes() >= UsefulBytes(offer) &&
         std::find(offer.sockets().begin(), offer.sockets().end(), address_) !=
             offer.sockets().end();
}

absl::Status SharedMemory::Begin() {
  SharedMemoryRequest request;
  request.mutable_mapped();
  absl::MutexLock lock(&begin_mu_);
  const absl::Status sent = socket_.Send(request, kServerPatience);
  has_begun_ = sent.ok();
  if (!sent.ok()) is_heard_.store(false, std::memory_order_relaxed);
  return sent;
}

absl::StatusOr<wire::FramePayload> SharedMemory::PayloadOf(const wire::FrameHeader& frame) const {
  const size_t bytes = mapping_.bytes();
  if (frame.shared_bytes > bytes || frame.shared_offset > bytes - frame.shared_bytes) {
    return absl::DataLossError(absl::StrCat("lane ", frame.lane, ", frame ", frame.sequence, ": ",
                                            frame.shared_bytes, " bytes at ", frame.shared_offset,
                                            " of shared memory that has ", bytes));
  }
  grpc::Slice slice(mapping_.data() + frame.shared_offset, frame.shared_bytes,
                    grpc::Slice::STATIC_SLICE);
  return wire::FramePayload({std::move(slice)}, 0, frame.shared_bytes);
}

bool SharedMemory::Acknowledge(uint32_t lane, uint64_t received) {
  if (!is_heard()) return false;
  {
    absl::ReaderMutexLock lock(&begin_mu_);
    if (!has_begun_) return false;
  }
  SharedMemoryRequest request;
  request.mutable_receipt()->set_lane(lane);
  request.mutable_receipt()->set_received(received);
  if (socket_.Send(request, kServerPatience).ok()) return true;
  is_heard_.store(false, std::memory_order_relaxed);
  return false;
}

}  // namespace prefilld::client
