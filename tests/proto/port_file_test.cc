#include "proto/wire/port_file.h"

#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

namespace prefilld::wire {
namespace {

TEST(PortFile, WhatIsWrittenIsReadBack) {
  const std::string path = ::testing::TempDir() + "/ports_written";
  std::filesystem::remove(path);
  EXPECT_EQ(ReadPortFile(path).status().code(), absl::StatusCode::kUnavailable);
  ASSERT_TRUE(WritePortFile(path, {.grpc = 50051, .metrics = 9464}).ok());
  const absl::StatusOr<Ports> ports = ReadPortFile(path);
  ASSERT_TRUE(ports.ok()) << ports.status();
  EXPECT_EQ(ports->grpc, 50051);
  EXPECT_EQ(ports->metrics, 9464);
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(PortFile, OneWithoutMetricsSaysSo) {
  const std::string path = ::testing::TempDir() + "/ports_without_metrics";
  ASSERT_TRUE(WritePortFile(path, {.grpc = 1}).ok());
  EXPECT_EQ(ReadPortFile(path)->metrics, 0);
}

TEST(PortFile, NoPathMeansNoFileAndAnImpossibleOneIsNamed) {
  EXPECT_TRUE(WritePortFile("", {}).ok());
  const absl::Status status = WritePortFile("/no/such/folder/ports", {});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "--port_file=/no/such/folder/ports cannot be written");
}

TEST(PortFile, OtherFilesAreRefused) {
  const std::string path = ::testing::TempDir() + "/no_ports";
  std::ofstream(path) << "hello";
  EXPECT_EQ(ReadPortFile(path).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace prefilld::wire
