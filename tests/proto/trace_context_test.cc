#include "proto/wire/trace_context.h"

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

using ::testing::ElementsAre;
using ::testing::MatchesRegex;
using ::testing::Pair;

constexpr char kParent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceContext, OfACallerIsGoneOnWithBelowItsSpan) {
  const TakenTrace taken = TakeTrace({kParent}, {"congo=t61rcWkgMzE", " rojo=00f067aa0ba902b7 "});
  EXPECT_FALSE(taken.ignored);
  EXPECT_EQ(taken.context.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(taken.context.parent_span_id, "00f067aa0ba902b7");
  EXPECT_EQ(taken.context.flags, "01");
  EXPECT_THAT(taken.context.span_id, MatchesRegex("[0-9a-f]{16}"));
  EXPECT_NE(taken.context.span_id, taken.context.parent_span_id);
  EXPECT_THAT(taken.context.Metadata(),
              ElementsAre(Pair("traceparent", absl::StrCat("00-4bf92f3577b34da6a3ce929d0e0e4736-",
                                                           taken.context.span_id, "-01")),
                          Pair("tracestate", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7")));
}

TEST(TraceContext, WithoutACallersBegins) {
  const TakenTrace taken = TakeTrace({}, {});
  EXPECT_FALSE(taken.ignored);
  EXPECT_THAT(taken.context.trace_id, MatchesRegex("[0-9a-f]{32}"));
  EXPECT_THAT(taken.context.span_id, MatchesRegex("[0-9a-f]{16}"));
  EXPECT_EQ(taken.context.parent_span_id, "");
  EXPECT_EQ(taken.context.flags, "00");
  EXPECT_NE(TakeTrace({}, {}).context.trace_id, taken.context.trace_id);
}

TEST(TraceContext, OfAChildNamesItsParent) {
  const TraceContext parent = TakeTrace({kParent}, {"a=b"}).context;
  const TraceContext child = parent.Child();
  EXPECT_EQ(child.trace_id, parent.trace_id);
  EXPECT_EQ(child.parent_span_id, parent.span_id);
  EXPECT_NE(child.span_id, parent.span_id);
  EXPECT_EQ(child.state, "a=b");
}

TEST(TraceContext, OfALaterVersionIsReadAsFarAsItIsKnown) {
  const std::string later = absl::StrCat("cc", std::string(kParent).substr(2), "-what-comes");
  EXPECT_EQ(TakeTrace({later}, {}).context.parent_span_id, "00f067aa0ba902b7");
  const std::string glued = absl::StrCat("cc", std::string(kParent).substr(2), "x");
  EXPECT_TRUE(TakeTrace({glued}, {}).ignored);
}

TEST(TraceContext, ThatIsNotValidIsIgnoredAndSaidSo) {
  const std::string valid = kParent;
  const auto with = [&valid](size_t at, const std::string& text) {
    return std::string(valid).replace(at, text.size(), text);
  };
  for (const std::string& hostile :
       {std::string(), std::string("00"), valid + "-", valid + "\n", with(0, "ff"), with(0, "0G"),
        with(2, "_"), with(3, "4BF9"), with(3, std::string(32, '0')),
        with(36, std::string(16, '0')), with(53, "0x"), std::string(1 << 20, 'a')}) {
    const TakenTrace taken = TakeTrace({hostile}, {"a=b"});
    EXPECT_TRUE(taken.ignored) << hostile.substr(0, 80);
    EXPECT_EQ(taken.context.parent_span_id, "");
    EXPECT_EQ(taken.context.state, "") << "a state is nothing without its trace";
    EXPECT_THAT(taken.context.trace_id, MatchesRegex("[0-9a-f]{32}"));
  }
  EXPECT_TRUE(TakeTrace({kParent, kParent}, {}).ignored) << "nobody knows which of two counts";
  EXPECT_TRUE(TakeTrace({}, {"a=b"}).ignored);
}

TEST(TraceState, ThatIsNotValidIsDroppedAndTheTraceKept) {
  std::string many;
  for (int i = 0; i < 33; ++i) absl::StrAppend(&many, "k", i, "=v,");
  for (const std::string& hostile :
       {std::string("novalue"), std::string("=v"), std::string("A=v"), std::string("a=b\x01"),
        std::string("a=b=c"), "a=" + std::string(257, 'v'), many,
        "a=" + std::string(250, 'v') + ",b=" + std::string(250, 'v') +
            ",c=" + std::string(20, 'v')}) {
    const TakenTrace taken = TakeTrace({kParent}, {hostile});
    EXPECT_TRUE(taken.ignored) << hostile.substr(0, 80);
    EXPECT_EQ(taken.context.state, "");
    EXPECT_EQ(taken.context.parent_span_id, "00f067aa0ba902b7");
  }
  EXPECT_FALSE(TakeTrace({kParent}, {"a=1,,b@c=2"}).ignored) << "empty members are legal";
}

}  // namespace
}  // namespace prefilld::wire
