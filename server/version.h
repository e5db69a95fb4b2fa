#ifndef PREFILLD_SERVER_VERSION_H_
#define PREFILLD_SERVER_VERSION_H_

namespace prefilld::server {

#ifndef PREFILLD_VERSION
#error "PREFILLD_VERSION comes from the build"
#endif
inline constexpr const char* kVersion = PREFILLD_VERSION;

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_VERSION_H_
