// The command line, word by word, and the flags that all benchmarks take. No CUDA.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "stats.h"

namespace polylora::bench {

/// Flags as "--flag VALUE" or "--flag=VALUE". What is wrong throws UsageError.
class Arguments {
 public:
  explicit Arguments(std::vector<std::string> words) : words_(std::move(words)) {}

  /// The next flag, in flag(); false: there is none.
  bool next() {
    if (has_inline_value_) throw UsageError(flag_ + " takes no value");
    if (at_ == words_.size()) return false;
    flag_ = words_[at_++];
    const size_t equals = flag_.find('=');
    has_inline_value_ = flag_.rfind("--", 0) == 0 && equals != std::string::npos;
    if (has_inline_value_) {
      inline_value_ = flag_.substr(equals + 1);
      flag_.resize(equals);
    }
    return true;
  }

  const std::string& flag() const { return flag_; }
  bool is(const char* flag) const { return flag_ == flag; }

  std::string value() {
    if (has_inline_value_) {
      has_inline_value_ = false;
      return inline_value_;
    }
    if (at_ == words_.size()) throw UsageError(flag_ + " needs a value");
    return words_[at_++];
  }

  std::string one_of(const std::vector<std::string>& known) { return checked(value(), known); }

  /// Names between commas.
  std::vector<std::string> some_of(const std::vector<std::string>& known) {
    std::vector<std::string> names;
    for (const std::string& name : split(value(), ',')) names.push_back(checked(name, known));
    return names;
  }

  double number(double low, double high) {
    const std::string text = value();
    char* end = nullptr;
    const double number = std::strtod(text.c_str(), &end);
    if (text.empty() || *end != '\0' || !(number >= low && number <= high)) {
      throw UsageError(format("%s must be a number from %g to %g, got '%s'", flag_.c_str(), low, high, text.c_str()));
    }
    return number;
  }

 private:
  std::string checked(const std::string& text, const std::vector<std::string>& known) const {
    std::string list;
    for (const std::string& name : known) {
      if (text == name) return text;
      list += (list.empty() ? "" : ", ") + name;
    }
    throw UsageError(flag_ + " must be one of " + list + ", got '" + text + "'");
  }

  std::vector<std::string> words_;
  size_t at_ = 0;
  std::string flag_;
  std::string inline_value_;
  bool has_inline_value_ = false;
};

/// What all benchmarks are told.
struct CommonOptions {
  std::string preset;                // empty: the benchmark's own, unless there are explicit cases
  std::vector<std::string> filters;  // a case runs when its name contains any of them
  std::vector<std::string> cases;    // explicit ones, as text
  std::vector<std::string> paths;    // values of POLYLORA_PATH; empty: the environment's
  bool json = false;
  bool calibrate = true;
  bool check = false;  // nothing is timed
  bool list = false;
  bool help = false;
  int reps = 15;
  double min_ms = 20;
};

inline constexpr const char* kCommonUsage = R"(
how
  --reps N                        replays at least, default 15
  --min-ms MS                     time measured at least, a case, default 20
  --no-calibrate                  take the documented H100 for the floor, measure nothing of this device
  --check                         check each case and time nothing, on as little memory as that takes; the default
                                    preset is check then, small cases of many kinds: for compute-sanitizer
  --json                          JSON lines instead of tables
  --help

exit codes: 0 all right; 1 a result was wrong or a call failed; 2 bad usage; 3 no GPU
)";

/// Takes the flag at hand where it is one of all benchmarks'; false where it is not. `paths`: those that the ops have.
inline bool take_common(Arguments& arguments, const std::vector<std::string>& presets,
                        const std::vector<std::string>& paths, CommonOptions& options) {
  if (arguments.is("--help") || arguments.is("-h")) {
    options.help = true;
  } else if (arguments.is("--preset")) {
    options.preset = arguments.one_of(presets);
  } else if (arguments.is("--case")) {
    options.cases.push_back(arguments.value());
  } else if (arguments.is("--filter")) {
    options.filters.push_back(arguments.value());
  } else if (arguments.is("--path")) {
    options.paths.push_back(arguments.one_of(paths));
  } else if (arguments.is("--json")) {
    options.json = true;
  } else if (arguments.is("--no-calibrate")) {
    options.calibrate = false;
  } else if (arguments.is("--check")) {
    options.check = true;
    options.calibrate = false;
  } else if (arguments.is("--list")) {
    options.list = true;
  } else if (arguments.is("--reps")) {
    options.reps = static_cast<int>(parse_integer(arguments.value(), arguments.flag(), 1, 100000));
  } else if (arguments.is("--min-ms")) {
    options.min_ms = arguments.number(0, 1e6);
  } else {
    return false;
  }
  return true;
}

/// Where nothing is timed, nothing has to be cold: weights come in as few sets as without an L2.
inline int64_t l2_that_counts(const CommonOptions& options, int64_t l2_bytes) { return options.check ? 1 : l2_bytes; }

/// Of `cases`, those that the filters leave. Throws UsageError where none is left.
template <typename AnyCase>
std::vector<AnyCase> filtered(const std::vector<AnyCase>& cases, const std::vector<std::string>& filters) {
  std::vector<AnyCase> kept;
  for (const AnyCase& c : cases) {
    bool keep = filters.empty();
    for (const std::string& filter : filters) keep = keep || c.name().find(filter) != std::string::npos;
    if (keep) kept.push_back(c);
  }
  if (kept.empty()) throw UsageError("no case is left: --list without --filter names them all");
  return kept;
}

}  // namespace polylora::bench
