// Tests the socket in a folder: which folders are refused, and that links lead nowhere.
#include "server/socket_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/wire/memory_socket_name.h"
#include "proto/wire/packet_socket.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class SocketFileTest : public ::testing::Test {
 protected:
  SocketFileTest() {
    folder_ = (std::filesystem::temp_directory_path() / "prefilld-kv-XXXXXX").string();
    if (mkdtemp(folder_.data()) == nullptr) abort();
  }
  ~SocketFileTest() override { std::filesystem::remove_all(folder_); }

  std::string folder_;
};

TEST_F(SocketFileTest, EveryUserWhoReachesTheFolderMayConnect) {
  const mode_t before = umask(077);
  auto file = SocketFile::Create(folder_);
  umask(before);
  ASSERT_TRUE(file.ok()) << file.status();
  struct stat facts = {};
  ASSERT_EQ(lstat((*file)->path().c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0666u);
  const std::string address = "unix:" + (*file)->path();
  EXPECT_TRUE(wire::IsMemorySocketAddress(address)) << address;
  EXPECT_TRUE(wire::PacketSocket::Connect(address).ok());
  file->reset();
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(SocketFileTest, AFolderInWhichOthersCouldTakeTheSocketsPlaceIsRefused) {
  for (const mode_t mode : {0777, 0770, 0757}) {
    ASSERT_EQ(chmod(folder_.c_str(), mode), 0);
    const auto file = SocketFile::Create(folder_);
    EXPECT_TRUE(absl::IsUnavailable(file.status())) << file.status();
    EXPECT_THAT(file.status().message(), HasSubstr("others may write in the folder"));
  }
  for (const mode_t mode : {0755, 0700, 01777}) {
    ASSERT_EQ(chmod(folder_.c_str(), mode), 0);
    EXPECT_TRUE(SocketFile::Create(folder_).ok()) << mode;
  }
  if (geteuid() != 0) return;
  constexpr uid_t kSomebody = 12345;
  ASSERT_EQ(chown(folder_.c_str(), kSomebody, kSomebody), 0);
  EXPECT_THAT(SocketFile::Create(folder_).status().message(),
              HasSubstr("the folder belongs to user 12345"));
}

TEST_F(SocketFileTest, ALinkAmongTheDeadSocketsIsLeftAloneAndItsTargetToo) {
  const std::string live = folder_ + "/other";
  const auto listener = wire::ListenForPackets("unix:" + live);
  ASSERT_TRUE(listener.ok()) << listener.status();
  const std::string link = folder_ + "/prefilld-00000000dead0000.sock";
  std::filesystem::create_symlink("/nowhere", link);
  const std::string text = folder_ + "/prefilld-00000000dead0001.sock";
  std::ofstream(text) << "no socket";
  const auto file = SocketFile::Create(folder_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_TRUE(std::filesystem::exists(text));
  EXPECT_TRUE(std::filesystem::exists(live));
}

// Their servers ended before they had given them their names.
TEST_F(SocketFileTest, SocketsThatWereNeverNamedAreRemovedUnlessTheyAreNew) {
  const std::string old = folder_ + "/prefilld-00000000dead0002.sock.new";
  const std::string young = folder_ + "/prefilld-00000000dead0003.sock.new";
  const std::string other = folder_ + "/another.sock.new";
  for (const std::string& path : {old, young, other}) {
    ASSERT_TRUE(wire::ListenForPackets("unix:" + path).ok());
    if (path == young) continue;
    const auto two_minutes_ago = std::filesystem::last_write_time(path) - std::chrono::minutes(2);
    std::filesystem::last_write_time(path, two_minutes_ago);
  }
  ASSERT_TRUE(SocketFile::Create(folder_).ok());
  EXPECT_FALSE(std::filesystem::exists(old));
  EXPECT_TRUE(std::filesystem::exists(young));
  EXPECT_TRUE(std::filesystem::exists(other));
}

TEST_F(SocketFileTest, AFolderThatIsNotThereOrTooLongIsNamed) {
  EXPECT_TRUE(absl::IsUnavailable(SocketFile::Create(folder_ + "/none").status()));
  const std::string deep = folder_ + "/" + std::string(100, 'd');
  std::filesystem::create_directory(deep);
  EXPECT_THAT(SocketFile::Create(deep).status().message(), HasSubstr("is no path of a socket"));
  EXPECT_TRUE(std::filesystem::is_empty(deep));
}

TEST(MemorySocketName, OnlyThoseOfServersAreTaken) {
  const std::string name = wire::NewMemorySocketName();
  EXPECT_TRUE(wire::IsMemorySocketAddress("unix-abstract:" + name));
  EXPECT_TRUE(wire::IsMemorySocketAddress("unix:/run/prefilld/" + name + ".sock"));
  for (const std::string& address :
       {std::string("unix:/run/docker.sock"), std::string("unix-abstract:/tmp/.X11-unix/X0"),
        std::string("unix:prefilld-0123456789abcdef.sock"),
        std::string("unix:/run/prefilld-0123456789abcdef"),
        std::string("unix:/run/prefilld-0123456789abcdeg.sock"),
        std::string("unix-abstract:prefilld-0123456789abcdef0"),
        "unix:/" + std::string(108, 'd') + "/prefilld-0123456789abcdef.sock",
        std::string("10.0.0.1:50051"), std::string("vsock:1:2"), std::string()}) {
    EXPECT_FALSE(wire::IsMemorySocketAddress(address)) << address;
  }
}

}  // namespace
}  // namespace prefilld::server
