#include "client/cli/text_tokens.h"

#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

extern char** environ;

namespace prefilld::client {
namespace {

absl::StatusOr<nlohmann::json> ReadConfig(const std::string& model_dir) {
  const std::string path = absl::StrCat(model_dir, "/config.json");
  std::ifstream file(path);
  auto config = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (config.is_object()) return config;
  return absl::FailedPreconditionError(
      absl::StrCat("--model: ", path, " cannot be read as a JSON object"));
}

// Tells whether config.json declares that tokens are bytes.
absl::StatusOr<bool> HasByteTokens(const std::string& model_dir) {
  PREFILLD_ASSIGN_OR_RETURN(const nlohmann::json config, ReadConfig(model_dir));
  const auto declared = config.find("byte_tokens");
  return declared != config.end() && *declared == true;
}

}  // namespace

absl::StatusOr<std::vector<uint32_t>> ByteTokens::Encode(absl::string_view text) {
  std::vector<uint32_t> ids;
  ids.reserve(text.size() + 1);
  if (bos_ >= 0) ids.push_back(static_cast<uint32_t>(bos_));
  for (const char byte : text) ids.push_back(static_cast<uint8_t>(byte));
  return ids;
}

absl::StatusOr<std::string> ByteTokens::Decode(uint32_t token_id) {
  return token_id < 256 ? std::string(1, static_cast<char>(token_id)) : std::string();
}

namespace {

using nlohmann::json;

// Starts the program with `socket` as its standard input and output.
int Spawn(const std::string& python, const std::string& model_dir, int socket, pid_t* pid) {
  std::vector<std::string> words = {python, "-m", "prefilld.text_tokens", model_dir};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, socket, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, socket, STDOUT_FILENO);
  // Signals that this program waits for are blocked here, and must not be so in the child.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t none;
  sigemptyset(&none);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  const int error = posix_spawnp(pid, argv[0], &actions, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  return error;
}

// Speaks to the tokenizer of the Python client, because there is no maintained one for C++: a
// process `python -m prefilld.text_tokens FOLDER`, which answers one line of JSON with one line
// (client/python/prefilld/text_tokens.py). It ends when this object is destroyed.
class TokenizerProcess final : public TextTokens {
 public:
  // FAILED_PRECONDITION says what is missing: Python, the package, or a tokenizer that can be read.
  static absl::StatusOr<std::unique_ptr<TextTokens>> Start(const std::string& python,
                                                           const std::string& model_dir);
  ~TokenizerProcess() override;
  TokenizerProcess(const TokenizerProcess&) = delete;
  TokenizerProcess& operator=(const TokenizerProcess&) = delete;

  // INVALID_ARGUMENT: the text is not UTF-8.
  absl::StatusOr<std::vector<uint32_t>> Encode(absl::string_view text) override;
  absl::StatusOr<std::string> Decode(uint32_t token_id) override;
  absl::StatusOr<std::string> DecodeRest() override;

 private:
  TokenizerProcess(pid_t pid, FILE* answers) : pid_(pid), answers_(answers) {}

  absl::StatusOr<nlohmann::json> ReadAnswer();
  absl::StatusOr<nlohmann::json> Ask(const nlohmann::json& question);
  absl::StatusOr<std::string> AskText(const nlohmann::json& question);

  const pid_t pid_;
  FILE* const answers_;  // owns the socket to the process; questions go through its descriptor
};

absl::StatusOr<std::unique_ptr<TextTokens>> TokenizerProcess::Start(const std::string& python,
                                                                    const std::string& model_dir) {
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
    return absl::InternalError(absl::StrCat("socketpair: ", std::strerror(errno)));
  }
  pid_t pid = -1;
  const int error = Spawn(python, model_dir, sockets[1], &pid);
  close(sockets[1]);
  if (error != 0) {
    close(sockets[0]);
    return absl::FailedPreconditionError(
        absl::StrCat("--python=", python, " cannot be run: ", std::strerror(error)));
  }
  std::unique_ptr<TokenizerProcess> process(new TokenizerProcess(pid, fdopen(sockets[0], "r")));
  PREFILLD_ASSIGN_OR_RETURN(const json greeting, process->ReadAnswer());
  if (!greeting.contains("vocab_size")) return absl::InternalError("unexpected greeting");
  return process;
}

TokenizerProcess::~TokenizerProcess() {
  std::fclose(answers_);  // its end of input ends the process
  kill(pid_, SIGTERM);    // which may still be starting
  waitpid(pid_, nullptr, 0);
}

absl::StatusOr<json> TokenizerProcess::ReadAnswer() {
  char* line = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&line, &capacity, answers_);
  const std::string text(line, length > 0 ? static_cast<size_t>(length) : 0);
  free(line);
  if (length <= 0) {
    return absl::FailedPreconditionError(
        "the tokenizer (python -m prefilld.text_tokens) ended without an answer. It needs the "
        "Python "
        "client with its tokenizer: pip install './client/python[tokenizer]'; --python names the "
        "Python that has it");
  }
  json answer = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!answer.is_object()) return absl::InternalError("the tokenizer's answer is no JSON object");
  if (const auto error = answer.find("error"); error != answer.end() && error->is_string()) {
    return absl::FailedPreconditionError(absl::StrCat("tokenizer: ", error->get<std::string>()));
  }
  return answer;
}

absl::StatusOr<json> TokenizerProcess::Ask(const json& question) {
  const std::string line = absl::StrCat(question.dump(), "\n");
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t written =
        send(fileno(answers_), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (written > 0) {
      sent += static_cast<size_t>(written);
    } else if (errno != EINTR) {
      return absl::InternalError(absl::StrCat("the tokenizer is gone: ", std::strerror(errno)));
    }
  }
  return ReadAnswer();
}

absl::StatusOr<std::vector<uint32_t>> TokenizerProcess::Encode(absl::string_view text) {
  json question = {{"text", text}};
  try {
    question.dump();
  } catch (const json::exception&) {
    return absl::InvalidArgumentError("the text is not UTF-8, which the model's tokenizer reads");
  }
  PREFILLD_ASSIGN_OR_RETURN(const json answer, Ask(question));
  std::vector<uint32_t> ids;
  const auto list = answer.find("token_ids");
  if (list == answer.end() || !list->is_array()) {
    return absl::InternalError("the tokenizer's answer has no token_ids");
  }
  for (const json& id : *list) {
    if (!id.is_number_unsigned()) return absl::InternalError("the tokenizer gave no token id");
    ids.push_back(id.get<uint32_t>());
  }
  return ids;
}

absl::StatusOr<std::string> TokenizerProcess::AskText(const json& question) {
  PREFILLD_ASSIGN_OR_RETURN(const json answer, Ask(question));
  const auto text = answer.find("text");
  if (text == answer.end() || !text->is_string()) {
    return absl::InternalError("the tokenizer's answer has no text");
  }
  return text->get<std::string>();
}

absl::StatusOr<std::string> TokenizerProcess::Decode(uint32_t token_id) {
  return AskText({{"token_id", token_id}});
}

absl::StatusOr<std::string> TokenizerProcess::DecodeRest() { return AskText({{"end", true}}); }

}  // namespace

absl::StatusOr<std::unique_ptr<TextTokens>> OpenTextTokens(const std::string& model_dir, int bos,
                                                           const std::string& python) {
  if (model_dir.empty()) {
    return absl::FailedPreconditionError(
        "a text needs --model=FOLDER, the folder of the model that is served: its tokenizer.json "
        "turns text into tokens. Without the folder, give the prompt as --token_ids");
  }
  PREFILLD_ASSIGN_OR_RETURN(const bool bytes, HasByteTokens(model_dir));
  if (bytes) return std::make_unique<ByteTokens>(bos);
  std::error_code ignored;
  if (!std::filesystem::exists(absl::StrCat(model_dir, "/tokenizer.json"), ignored)) {
    return absl::FailedPreconditionError(absl::StrCat(
        model_dir,
        " has no tokenizer.json, and its config.json does not say \"byte_tokens\": true; "
        "text cannot become tokens of this model. Give the prompt as --token_ids"));
  }
  return TokenizerProcess::Start(python, model_dir);
}

absl::Status CheckServedModel(const std::string& model_dir, uint32_t vocab_size,
                              uint32_t num_layers) {
  PREFILLD_ASSIGN_OR_RETURN(const nlohmann::json config, ReadConfig(model_dir));
  for (const auto& [field, served] :
       {std::pair("vocab_size", vocab_size), {"num_hidden_layers", num_layers}}) {
    const auto own = config.find(field);
    if (served == 0 || own == config.end() || *own == served) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("--model: ", model_dir, " is not the model that is served, whose ", field,
                     " is ", served, " and not ", own->dump().substr(0, 40),
                     "; its tokenizer would make other tokens of a text"));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::client
