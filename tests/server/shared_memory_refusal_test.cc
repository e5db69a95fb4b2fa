// Tests that a memory which is not as it has to be is refused in words, and costs the request
// nothing but the faster way.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "proto/process/log.h"
#include "tests/server/shared_memory_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class SharedMemoryRefusal : public SharedMemoryServer<ServerFixture> {
 protected:
  // Opens a request, has `bring` attach, and expects a refusal, and the whole cache over gRPC.
  void Expect(const std::string& reason,
              const std::function<v1::SharedMemoryAttached(Visitor&, const v1::Accepted&)>& bring) {
    const double before = Visitors("unfit");
    v1::Accepted accepted;
    auto stream = Open(accepted);
    Visitor visitor(accepted);
    const v1::SharedMemoryAttached answer = bring(visitor, accepted);
    EXPECT_EQ(answer.code(), static_cast<int>(absl::StatusCode::kInvalidArgument)) << reason;
    EXPECT_THAT(answer.message(), HasSubstr(reason));
    EXPECT_TRUE(visitor.IsClosed());
    EXPECT_EQ(Visitors("unfit"), before + 1) << reason;
    engine_->HoldAfter(-1);
    const StreamContents contents = stream->Rest();
    EXPECT_TRUE(contents.status.ok()) << contents.status.error_message();
    ExpectWholeCache(contents.frames(), accepted.layout());
    EXPECT_TRUE(MemoryIsFree());
  }
  void ExpectUnfit(const std::string& reason, wire::Descriptor memory, uint64_t more_bytes = 0) {
    Expect(reason, [&](Visitor& visitor, const v1::Accepted& accepted) {
      const uint64_t bytes = kBytes + more_bytes;
      return visitor.Send(accepted, accepted.shared_memory().key(), bytes, memory.get());
    });
  }

  static constexpr uint64_t kBytes = 8 << 20;
};

// The rest of the checks are in shared_region_test.cc.
TEST_F(SharedMemoryRefusal, OfMemoryThatIsNotAsItHasToBe) {
  StartServer();
  wire::Descriptor unsealed(memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(fallocate(unsealed.get(), 0, 0, kBytes), 0);
  ExpectUnfit("F_SEAL_SHRINK and F_SEAL_GROW", std::move(unsealed));
  wire::Descriptor sparse(memfd_create("sparse", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(sparse.get(), kBytes), 0);
  ASSERT_EQ(fcntl(sparse.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  ExpectUnfit("of 8388608 bytes 0 are allocated", std::move(sparse));
  ExpectUnfit("has 4194304 bytes; attach says 8388608", *wire::MakeSealedMemory(kBytes / 2));
  std::array<int, 2> ends;
  ASSERT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
  const wire::Descriptor other_end(ends[0]);
  ExpectUnfit("no memfd", wire::Descriptor(ends[1]));
}

TEST_F(SharedMemoryRefusal, LeavesTheRequestToABetterMemoryAndIsLoggedOnce) {
  static const bool logging = (process::InitLogging(process::LogFormat::kText), true);
  ASSERT_TRUE(logging);
  StartServer();
  v1::Accepted accepted;
  const auto stream = Open(accepted);
  const std::string key = accepted.shared_memory().key();
  testing::internal::CaptureStderr();
  for (int attempt = 0; attempt < 3; ++attempt) {
    Visitor unfit(accepted);
    EXPECT_EQ(unfit.Send(accepted, key, kBytes, -1).code(),
              static_cast<int>(absl::StatusCode::kInvalidArgument));
    EXPECT_TRUE(unfit.IsClosed());
  }
  Visitor fit(accepted);
  EXPECT_EQ(fit.Attach(accepted).code(), 0);
  Visitor late(accepted);
  EXPECT_EQ(late.Attach(accepted).code(), static_cast<int>(absl::StatusCode::kAlreadyExists));
  fit.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  ExpectWholeCache(ReadAll(*stream, fit), accepted.layout());
  EXPECT_TRUE(stream->Finish().ok());
  const std::string log = testing::internal::GetCapturedStderr();
  const size_t first = log.find("shared_memory_refused");
  EXPECT_NE(first, std::string::npos) << log;
  EXPECT_EQ(log.find("shared_memory_refused", first + 1), std::string::npos) << log;
}

TEST_F(SharedMemoryRefusal, OfASizeThatNoRequestCanUse) {
  StartServer();
  // 16 lanes with four buffers of 1 MiB each, and four more.
  constexpr uint64_t kMost = 68 << 20;
  ExpectUnfit("bytes 71307264; from 1048576, a frame, to 71303168",
              *wire::MakeSealedMemory(kMost + 4096), kMost + 4096 - kBytes);
  Expect("bytes 4096; from 1048576", [&](Visitor& visitor, const v1::Accepted& accepted) {
    const wire::Descriptor memory = *wire::MakeSealedMemory(4096);
    return visitor.Send(accepted, accepted.shared_memory().key(), 4096, memory.get());
  });
  Expect("from 1048576", [&](Visitor& visitor, const v1::Accepted& accepted) {
    const wire::Descriptor memory = *wire::MakeSealedMemory(4096);
    return visitor.Send(accepted, accepted.shared_memory().key(), ~uint64_t{0}, memory.get());
  });
}

TEST_F(SharedMemoryRefusal, OfNoDescriptorAndOfTwo) {
  StartServer();
  Expect("no descriptor came", [&](Visitor& visitor, const v1::Accepted& accepted) {
    return visitor.Send(accepted, accepted.shared_memory().key(), kBytes, -1);
  });
  for (const size_t count : {2, 5}) {
    Expect("several descriptors came", [&](Visitor&, const v1::Accepted& accepted) {
      // PacketSocket sends one alone.
      const std::string address = accepted.shared_memory().sockets(0);
      const std::string name = address.substr(address.find(':') + 1);
      wire::Descriptor fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
      sockaddr_un peer = {};
      peer.sun_family = AF_UNIX;
      name.copy(peer.sun_path + 1, name.size());
      const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
      EXPECT_EQ(connect(fd.get(), reinterpret_cast<const sockaddr*>(&peer), length), 0);

      v1::SharedMemoryRequest request;
      request.mutable_attach()->set_request_id(accepted.request_id());
      request.mutable_attach()->set_key(accepted.shared_memory().key());
      request.mutable_attach()->set_bytes(kBytes);
      std::string bytes = request.SerializeAsString();
      const wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
      const std::vector<int> descriptors(count, memory.get());
      std::vector<char> control(CMSG_SPACE(count * sizeof(int)));
      iovec piece = {.iov_base = bytes.data(), .iov_len = bytes.size()};
      msghdr packet = {};
      packet.msg_iov = &piece;
      packet.msg_iovlen = 1;
      packet.msg_control = control.data();
      packet.msg_controllen = control.size();
      cmsghdr* const header = CMSG_FIRSTHDR(&packet);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(count * sizeof(int));
      std::memcpy(CMSG_DATA(header), descriptors.data(), count * sizeof(int));
      EXPECT_EQ(sendmsg(fd.get(), &packet, 0), static_cast<ssize_t>(bytes.size()));
      std::array<char, 1024> answer;
      const ssize_t size = recv(fd.get(), answer.data(), answer.size(), 0);
      v1::SharedMemoryAttached attached;
      EXPECT_TRUE(attached.ParseFromArray(answer.data(), static_cast<int>(size)));
      return attached;
    });
  }
}

}  // namespace
}  // namespace prefilld::server
