// Compiled once for each instruction set, with NOISEPOLICY_ISA (its name) and NOISEPOLICY_SIMD (its header) defined.
// Nothing here may be shared between those objects, or the linker could pick the wrong one: no templates from outside.
#include "blocks.h"

#include "vector_math.h"

namespace noisepolicy::cpu::NOISEPOLICY_ISA {
namespace {

constexpr double kHalfLogTwoPi = 0.918938533204672742;

// Runs body(i, n) over a block: whole vectors, then what is left (n < kWidth).
template <typename Whole, typename Partial>
inline void over(int64_t count, Whole whole, Partial partial) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) whole(i);
  if (i < count) partial(i, count - i);
}

void words(uint64_t seed, uint64_t counter, int64_t count, uint32_t* out) {
  const Keys keys(seed);
  for (int64_t i = 0; i < count; i += 4 * kWidth, counter += kWidth) store_words(keys, counter, out + i);
}

void normals(uint64_t seed, uint64_t counter, int64_t count, float* out) {
  // In two passes: each is short enough for the processor to run several of its iterations at once.
  uint32_t random[kBlock + kNoisePadding];
  words(seed, counter, count, random);
  for (int64_t i = 0; i < count; i += 4 * kWidth) store_normals(random + i, out + i);
}

// Sums of squared noise and of log_std; lanes beyond the end add zero.
struct Sums {
  Vector square = broadcast(0.0f), log_std = broadcast(0.0f);

  void add(Vector noise, Vector s) {
    square = fma(noise, noise, square);
    log_std = log_std + s;
  }

  double log_density(const BlockView& view) const {
    const double total_log_std = view.log_std ? sum(log_std) : static_cast<double>(view.shared_log_std) * view.count;
    return -0.5 * sum(square) - total_log_std - kHalfLogTwoPi * static_cast<double>(view.count);
  }
};

double shift_and_scale(const BlockView& view, const float* noise, float* out) {
  Sums sums;
  if (view.log_std) {
    const auto element = [&](Vector e, Vector m, Vector s) {
      sums.add(e, s);
      return fma(exponential(s), e, m);
    };
    over(
        view.count,
        [&](int64_t i) { store(out + i, element(load(noise + i), load(view.mean + i), load(view.log_std + i))); },
        [&](int64_t i, int64_t n) {
          const Vector value =
              element(load_partial(noise + i, n), load_partial(view.mean + i, n), load_partial(view.log_std + i, n));
          store_partial(out + i, value, n);
        });
  } else {
    const Vector std = exponential(broadcast(view.shared_log_std)), zero = broadcast(0.0f);
    const auto element = [&](Vector e, Vector m) {
      sums.add(e, zero);
      return fma(std, e, m);
    };
    over(
        view.count, [&](int64_t i) { store(out + i, element(load(noise + i), load(view.mean + i))); },
        [&](int64_t i, int64_t n) {
          store_partial(out + i, element(load_partial(noise + i, n), load_partial(view.mean + i, n)), n);
        });
  }
  return sums.log_density(view);
}

// Of an element: noise = (value - mean) / std, and for KL its mean^2 + std^2 - 1.
template <bool kWithKl>
BlockTerms reduce(const BlockView& view, const float* values) {
  Sums sums;
  Vector excess = broadcast(0.0f);
  const Vector one = broadcast(1.0f);
  if (view.log_std) {
    const auto element = [&](Vector x, Vector m, Vector s) {
      Vector std, inverse;
      exponentials(s, std, inverse);
      sums.add((x - m) * inverse, s);
      if (kWithKl) excess = excess + fma(m, m, fma(std, std, -one));
    };
    over(
        view.count, [&](int64_t i) { element(load(values + i), load(view.mean + i), load(view.log_std + i)); },
        [&](int64_t i, int64_t n) {
          element(load_partial(values + i, n), load_partial(view.mean + i, n), load_partial(view.log_std + i, n));
        });
  } else {
    const Vector inverse = exponential(broadcast(-view.shared_log_std)), zero = broadcast(0.0f);
    const auto element = [&](Vector x, Vector m) {
      sums.add((x - m) * inverse, zero);
      if (kWithKl) excess = fma(m, m, excess);
    };
    over(
        view.count, [&](int64_t i) { element(load(values + i), load(view.mean + i)); },
        [&](int64_t i, int64_t n) { element(load_partial(values + i, n), load_partial(view.mean + i, n)); });
  }
  BlockTerms terms{sums.log_density(view), 0.0};
  if (kWithKl) {
    const double s = view.shared_log_std, count = static_cast<double>(view.count);
    terms.kl_to_prior = view.log_std ? 0.5 * sum(excess) - sum(sums.log_std)
                                     : 0.5 * (sum(excess) + count * (__builtin_exp(2.0 * s) - 1.0)) - count * s;
  }
  return terms;
}

double log_prob(const BlockView& view, const float* values) { return reduce<false>(view, values).log_prob; }
BlockTerms terms(const BlockView& view, const float* values) { return reduce<true>(view, values); }

double backward(const BlockView& view, const float* values, float grad_log_prob, float grad_kl,
                const BlockGradients& out) {
  const Vector weight = broadcast(grad_log_prob), kl_weight = broadcast(grad_kl);
  const Vector minus_weight = broadcast(-grad_log_prob), minus_weights = broadcast(-grad_log_prob - grad_kl);
  Vector total = broadcast(0.0f), of_value, of_mean, of_log_std;
  // `rest` is what d / d log_std has beside weight * noise^2.
  const auto element = [&](Vector x, Vector m, Vector inverse, Vector rest) {
    const Vector noise = (x - m) * inverse, weighted = weight * noise;
    of_value = weighted * inverse;
    of_mean = fma(kl_weight, m, of_value);
    of_log_std = fma(weighted, noise, rest);
  };
  if (view.log_std) {
    const auto full = [&](Vector x, Vector m, Vector s) {
      Vector std, inverse;
      exponentials(s, std, inverse);
      element(x, m, inverse, fma(kl_weight * std, std, minus_weights));
    };
    over(
        view.count,
        [&](int64_t i) {
          full(load(values + i), load(view.mean + i), load(view.log_std + i));
          store(out.mean + i, of_mean);
          store(out.log_std + i, of_log_std);
          if (out.latents) store(out.latents + i, -of_value);
        },
        [&](int64_t i, int64_t n) {
          full(load_partial(values + i, n), load_partial(view.mean + i, n), load_partial(view.log_std + i, n));
          store_partial(out.mean + i, of_mean, n);
          store_partial(out.log_std + i, of_log_std, n);
          if (out.latents) store_partial(out.latents + i, -of_value, n);
        });
    return 0.0;
  }
  const Vector inverse = exponential(broadcast(-view.shared_log_std));
  over(
      view.count,
      [&](int64_t i) {
        element(load(values + i), load(view.mean + i), inverse, minus_weight);
        store(out.mean + i, of_mean);
        if (out.latents) store(out.latents + i, -of_value);
        total = total + of_log_std;
      },
      [&](int64_t i, int64_t n) {
        element(load_partial(values + i, n), load_partial(view.mean + i, n), inverse, minus_weight);
        store_partial(out.mean + i, of_mean, n);
        if (out.latents) store_partial(out.latents + i, -of_value, n);
        // Lanes beyond the end hold noise 0 and so -weight each.
        alignas(64) float lanes[kWidth];
        store(lanes, of_log_std);
        total = total + load_partial(lanes, n);
      });
  const double variance = __builtin_exp(2.0 * static_cast<double>(view.shared_log_std));
  return sum(total) + static_cast<double>(grad_kl) * static_cast<double>(view.count) * (variance - 1.0);
}

void analyse(const float* plane, int64_t height, int64_t width, const float* weights, float* out) {
  const auto column = [&](auto load_row, auto store_row) {
    Vector sums[kBandTile];
    for (Vector& value : sums) value = broadcast(0.0f);
    for (int64_t y = 0; y < height; ++y) {
      const Vector value = load_row(plane + y * width);
      for (int v = 0; v < kBandTile; ++v) sums[v] = fma(broadcast(weights[y * kBandTile + v]), value, sums[v]);
    }
    for (int v = 0; v < kBandTile; ++v) store_row(out + v * width, sums[v]);
  };
  over(
      width,
      [&](int64_t x) {
        column([=](const float* row) { return load(row + x); },
               [=](float* row, Vector value) { store(row + x, value); });
      },
      [&](int64_t x, int64_t n) {
        column([=](const float* row) { return load_partial(row + x, n); },
               [=](float* row, Vector value) { store_partial(row + x, value, n); });
      });
}

void synthesise(const float* field, int64_t height, int64_t width, const float* weights, float* plane) {
  const auto column = [&](auto load_row, auto store_row) {
    Vector values[kBandTile];
    for (int v = 0; v < kBandTile; ++v) values[v] = load_row(field + v * width);
    for (int64_t y = 0; y < height; ++y) {
      Vector value = load_row(plane + y * width);
      for (int v = 0; v < kBandTile; ++v) value = fma(broadcast(weights[y * kBandTile + v]), values[v], value);
      store_row(plane + y * width, value);
    }
  };
  over(
      width,
      [&](int64_t x) {
        column([=](const float* row) { return load(row + x); },
               [=](float* row, Vector value) { store(row + x, value); });
      },
      [&](int64_t x, int64_t n) {
        column([=](const float* row) { return load_partial(row + x, n); },
               [=](float* row, Vector value) { store_partial(row + x, value, n); });
      });
}

float dot(const float* a, const float* b, int64_t count) {
  Vector total = broadcast(0.0f);
  over(
      count, [&](int64_t i) { total = fma(load(a + i), load(b + i), total); },
      [&](int64_t i, int64_t n) { total = fma(load_partial(a + i, n), load_partial(b + i, n), total); });
  return static_cast<float>(sum(total));
}

void from_half(const Half* source, int64_t count, float* out) { convert(source, count, out); }
void to_half(const float* source, int64_t count, Half* out) { convert_back(source, count, out); }
void from_bfloat16(const BFloat16* source, int64_t count, float* out) { convert(source, count, out); }
void to_bfloat16(const float* source, int64_t count, BFloat16* out) { convert_back(source, count, out); }

}  // namespace

#define NOISEPOLICY_TEXT2(name) #name
#define NOISEPOLICY_TEXT(name) NOISEPOLICY_TEXT2(name)
extern const BlockKernels kernels;
const BlockKernels kernels = {NOISEPOLICY_TEXT(NOISEPOLICY_ISA),
                              normals,
                              words,
                              shift_and_scale,
                              log_prob,
                              terms,
                              backward,
                              analyse,
                              synthesise,
                              dot,
                              from_half,
                              to_half,
                              from_bfloat16,
                              to_bfloat16};

}  // namespace noisepolicy::cpu::NOISEPOLICY_ISA
