// The addresses behind the names that requests have their KV pushed to, for the log.
#ifndef PREFILLD_SERVER_RECEIVER_LOOKUP_H_
#define PREFILLD_SERVER_RECEIVER_LOOKUP_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace prefilld::server {

// An allow-list admits a name as a name; where it leads is up to its owner. So an operator sees in
// the log where each push went: every address that the name had when the push began.
//
// A look-up may take as long as a name server likes, so one thread of its own makes them all and no
// push waits for it. Thread-safe.
class ReceiverLookup {
 public:
  // Resolves a host to all its addresses, or to none. May block.
  using Resolver = std::function<std::vector<std::string>(const std::string& host)>;

  explicit ReceiverLookup(Resolver resolver = Resolve);
  // Does not wait for a look-up under way, and logs nothing of it.
  ~ReceiverLookup();

  // Logs "receiver_addresses" for a request whose receiver, host:port, is a name. Does nothing for
  // other receivers. If too many look-ups wait, the log says so instead.
  void Log(const std::string& request_id, const std::string& receiver);

  // Asks the system's resolver.
  static std::vector<std::string> Resolve(const std::string& host);

 private:
  struct State;

  static void Run(const std::shared_ptr<State>& state);

  // The thread, which may outlive this, owns it too.
  const std::shared_ptr<State> state_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_RECEIVER_LOOKUP_H_
