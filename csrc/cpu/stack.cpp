// residual_stack on the CPU.  The rows of a batch lie along the SIMD lanes: a thread carries a tile of
// panels, each `panel` rows wide, through all layers.  Inside a panel a feature is a few vectors, so that
// means, slopes and residual updates need no shuffles, and both passes over the rows read the weights
// as they lie in memory, element by element:
//     forward        h[j] = sum over k of W[j][k] x[k]
//     backward-data  g[k] += sum over j of W[j][k] d[j]
// Inside a block of several layers, or where x is normalized or activated first, x and g are not the stream
// and its gradient but panels beside them.
// The weight gradient, dW[j][k] = sum over rows of d[j][row] x[row][k], has k along the lanes instead.
// Compiled once per instruction set; everything here has internal linkage or lives in the set's namespace.
#include <type_traits>

#include "gemm.h"
#include "kernels.h"
#include "math/homogeneous.h"
#include "simd.h"

namespace depthnet {
namespace DEPTHNET_ISA {
namespace {

constexpr int64_t kGroup = 32;   // features whose signs share a word
// Backward-data goes through so many rows of W at a time, which stay in the second-level cache while their
// columns are read, and where W needs another form, through so many columns.
template <class T> constexpr int64_t kPiece = 1024 / sizeof(T);
constexpr int64_t kStage = 48;
constexpr int64_t kRowChunk = 256;  // rows that backward-weight goes through at a time
constexpr int64_t kTileRows = 256, kTileBytes = 1 << 19;  // a tile stays in the second-level cache
constexpr double kNormEps = 1e-5;  // added to the variance

template <class T> constexpr int64_t kAhead = 64 / sizeof(T);  // a line of the caches

template <class T> constexpr bool kSame = sizeof(T) == sizeof(Compute<T>);

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t blocks_of(int64_t size, int64_t n) { return (n + size - 1) / size; }
template <class T> int64_t squares(int64_t n) {
  return blocks_of(kLanes<Compute<T>>, n) * kLanes<Compute<T>>;
}
template <class T> int64_t terms(int64_t n) { return blocks_of(kTerms<T>, n); }

int64_t tile_panels(const Stack& s, int64_t element) {
  const int64_t arrays = plain(s) ? 2 : 3;
  int64_t fit = kTileBytes / (arrays * s.n * s.panel * element + 1), wanted = kTileRows / s.panel;
  fit = smaller(fit, wanted);
  return fit > 0 ? fit : 1;
}

// Cuts a thread's memory into arrays; with memory at 0 it only counts.
struct Cutter {
  uintptr_t at;
  template <class U> U* take(int64_t count) {
    U* taken = reinterpret_cast<U*>(at);
    at += uintptr_t(blocks_of(64, count * int64_t(sizeof(U))) * 64);
    return taken;
  }
};

// What a thread carries through the layers, of every panel of its tile.
template <class T, class C = Compute<T>>
struct Tile {
  int64_t width, features, groups;
  C* stream;            // [features][width]: x, or the gradient of x
  C* branch;            // [features][width]: forward phi(h), backward d where it is not kept
  Operand<T>* operand;  // [terms(features)][width]: what W is multiplied by, where it is not the above
  C* inner;             // [features][width]: backward, the gradient of a layer's operand
  Lane<C>* words;       // [groups][width]: the signs
  C* sums;              // [width]: sums over the features
  Operand<T>* weights = nullptr;  // in the form that the products take, where memory has another

  Tile(const Stack& s, Cutter& cut)
      : width(s.panel), features(squares<T>(s.n)), groups(blocks_of(kGroup, s.n)) {
    const int64_t panels = tile_panels(s, sizeof(C));
    stream = cut.take<C>(panels * features * width);
    branch = cut.take<C>(panels * features * width);
    operand = kSame<T> && plain(s) ? nullptr : cut.take<Operand<T>>(panels * features * width);
    inner = plain(s) ? nullptr : cut.take<C>(panels * features * width);
    words = cut.take<Lane<C>>(panels * groups * width);
    sums = cut.take<C>(panels * width);
    if (kSame<T>) return;
    const int64_t rows = kOutputs * terms<T>(s.n), columns = terms<T>(smaller(kPiece<T>, s.n)) * kStage;
    weights = cut.take<Operand<T>>(rows > columns ? rows : columns);
  }
};

// A square of lanes x lanes elements, from feature f on, in the form of an operand.
template <class T, class C>
void put_operand(Operand<T>* operand, int64_t f, int64_t width, const Vec<C>* square) {
  if constexpr (kTerms<T> == 2) {
    for (int i = 0; i < kLanes<C>; i += 2) {
      const Word pair = to_bfloat16(square[i]) | to_bfloat16(square[i + 1]) << 16;
      std::memcpy(operand + (f + i) / 2 * width, &pair, sizeof pair);
    }
  } else {
    for (int i = 0; i < kLanes<C>; ++i) store(operand + (f + i) * width, rounded<T>(square[i]));
  }
}

// `valid` rows of n elements into a panel, the rest zeros; and, rounded, into `copy`.
template <class T, int V, class From, class C = Compute<T>>
void load_panel(const From* rows, int64_t valid, int64_t n, int64_t width, C* stream, Operand<T>* operand,
                T* copy) {
  for (int v = 0; v < V; ++v, stream += kLanes<C>)
    for (int64_t f = 0; f < n; f += kLanes<C>) {
      Vec<C> square[kLanes<C>];
      for (int i = 0; i < kLanes<C>; ++i) {
        const int64_t row = v * kLanes<C> + i;
        square[i] = row < valid ? load_some(rows + row * n + f, n - f) : Vec<C>{};
        if (copy && row < valid) store_some(copy + row * n + f, square[i], n - f);
      }
      transpose<C>(square);
      for (int i = 0; i < kLanes<C>; ++i) store(stream + (f + i) * width, square[i]);
      if (operand) put_operand<T, C>(operand + v * kLanes<C>, f, width, square);
    }
}

template <class T, class C = Compute<T>>
[[gnu::always_inline]] inline void store_square(Vec<C>* square, T* rows, int64_t valid, int64_t n,
                                                int64_t f, bool past_caches = false) {
  transpose<C>(square);
  if constexpr (kSame<T>)
    if (past_caches) {
      for (int i = 0; i < kLanes<C> && i < valid; ++i) stream(rows + i * n + f, square[i]);
      return;
    }
  for (int i = 0; i < kLanes<C> && i < valid; ++i) store_some(rows + i * n + f, square[i], n - f);
}

// x <- x + scale * (z - mean z) for a panel; where `out` is given the rows go there, too.
template <class T, int V, class Out, class C = Compute<T>>
void finish_panel(const Stack& s, C scale, const Tile<T>& tile, int64_t panel, int64_t valid, Out* out,
                  bool past_caches = false) {
  const int64_t size = panel * tile.features * tile.width;
  Operand<T>* operand = plain(s) ? tile.operand : nullptr;
  for (int v = 0; v < V; ++v) {
    C* stream = tile.stream + size + v * kLanes<C>;
    const C* branch = tile.branch + size + v * kLanes<C>;
    const Vec<C> sum = load(tile.sums + panel * tile.width + v * kLanes<C>);
    const Vec<C> mean = s.mean_subtract ? sum / C(s.n) : Vec<C>{}, factor = broadcast(scale);
    for (int64_t f = 0; f < s.n; f += kLanes<C>) {
      Vec<C> square[kLanes<C>];
      for (int i = 0; i < kLanes<C>; ++i) {
        C* x = stream + (f + i) * tile.width;
        square[i] = residual_update(load(x), load(branch + (f + i) * tile.width), mean, factor);
        store(x, square[i]);
      }
      if (operand)
        put_operand<T, C>(operand + terms<T>(size) + v * kLanes<C>, f, tile.width, square);
      if (out)
        store_square(square, out + v * kLanes<C> * s.n, valid - v * kLanes<C>, s.n, f, past_caches);
    }
  }
}

// Sign words of a panel to and from rows of bytes.
template <class C>
void write_signs(const Lane<C>* words, int64_t width, int64_t valid, int64_t n, uint8_t* rows) {
  const int64_t bytes = blocks_of(8, n);
  for (int64_t at = 0; at < bytes; at += 4, words += width)
    for (int64_t row = 0; row < valid; ++row) {
      const uint32_t word = uint32_t(words[row]);
      uint8_t* to = rows + row * bytes + at;
      if (at + 4 <= bytes) std::memcpy(to, &word, 4);
      else std::memcpy(to, &word, size_t(bytes - at));
    }
}
template <class C>
void read_signs(const uint8_t* rows, int64_t width, int64_t valid, int64_t n, Lane<C>* words) {
  const int64_t bytes = blocks_of(8, n);
  for (int64_t at = 0; at < bytes; at += 4, words += width) {
    for (int64_t row = 0; row < valid; ++row) {
      uint32_t word = 0;
      const uint8_t* from = rows + row * bytes + at;
      if (at + 4 <= bytes) std::memcpy(&word, from, 4);
      else std::memcpy(&word, from, size_t(bytes - at));
      words[row] = Lane<C>(word);
    }
    for (int64_t row = valid; row < width; ++row) words[row] = 0;
  }
}

// The bits of `count` features from feature j on, the first lowest, into the words of a vector of rows.
template <class C>
void add_signs(Mask<C> bits, int64_t j, int64_t count, Lane<C>* words, int64_t width) {
  const auto add = [](Lane<C>* word, Mask<C> more) {
    Mask<C> sum;
    std::memcpy(&sum, word, sizeof sum);
    sum |= more;
    std::memcpy(word, &sum, sizeof sum);
  };
  const int shift = int(j % kGroup);
  words += j / kGroup * width;
  add(words, bits << shift);
  if (shift + count > kGroup) add(words + width, bits >> (kGroup - shift));
}

// M rows of W, from row j on, as the first operand of the forward product.
template <class T>
const Operand<T>* weight_rows(const T* weight, int64_t n, int64_t rows, Operand<T>* staged) {
  using C = Compute<T>;
  if constexpr (kSame<T>) return weight;
  const int64_t length = terms<T>(n);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = weight + row * n;
    Operand<T>* to = staged + row * length;
    if constexpr (kTerms<T> == 2) {
      to[length - 1] = {};
      std::memcpy(to, from, size_t(n) * sizeof(T));
    } else {
      for (int64_t k = 0; k < n; k += kLanes<C>) store_some(to + k, load_some(from + k, n - k), n - k);
    }
  }
  return staged;
}

// `columns` columns of `rows` rows, which lie n apart, as an operand of a product over the rows:
// [terms(rows)][step], padded to whole vectors.
template <class T>
void stage(const T* from, int64_t n, int64_t rows, int64_t columns, Operand<T>* staged, int64_t step) {
  using C = Compute<T>;
  for (int64_t row = 0; row < rows; row += kTerms<T>, from += kTerms<T> * n, staged += step)
    for (int64_t k = 0; k < columns; k += kLanes<C>) {
      const Vec<C> first = load_some(from + k, columns - k);
      if constexpr (kTerms<T> == 2) {
        const Vec<C> second = row + 1 < rows ? load_some(from + n + k, columns - k) : Vec<C>{};
        const Word pair = Word(first) >> 16 | (Word(second) & 0xffff0000u);
        std::memcpy(staged + k, &pair, sizeof pair);
      } else {
        store(staged + k, first);
      }
    }
}

// Where the d of a layer start, counted in panels.
int64_t kept_panels(const Stack& s, int64_t member, int64_t layer) {
  return (member * (s.layer_end - s.layer_begin) + layer - s.layer_begin) * panels_of(s);
}

// Adds a block's sums over its features to those of a panel.
template <class C, int V>
void add_sums(C* panel, const Vec<C> (&sums)[V]) {
  for (int v = 0; v < V; ++v) store(panel + v * kLanes<C>, load(panel + v * kLanes<C>) + sums[v]);
}

// The sum over the features, in four parts that do not wait for each other.
template <class C, class F>
Vec<C> sum_of(int64_t n, const F& term) {
  Vec<C> sums[4]{};
  int64_t f = 0;
  for (; f + 4 <= n; f += 4)
    for (int i = 0; i < 4; ++i) sums[i] += term(f + i);
  for (; f < n; ++f) sums[0] += term(f);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The rows of a tensor that has some for every layer, from `row` on.
template <class U>
U* rows_of(U* tensor, int64_t member_stride, int64_t row_size, const Stack& s, int64_t member,
           int64_t layer, int64_t row) {
  return tensor ? tensor + member * member_stride + (layer * s.rows + row) * row_size : nullptr;
}
template <class T>
T* input_rows(const Stack& s, int64_t member, int64_t layer, int64_t row) {
  return rows_of(static_cast<T*>(s.inputs), s.inputs_member, s.n, s, member, layer, row);
}
uint8_t* sign_rows(const Stack& s, int64_t member, int64_t layer, int64_t row) {
  return rows_of(s.signs, s.signs_member, blocks_of(8, s.n), s, member, layer, row);
}
template <class C>
C* inverse_rows(const Stack& s, int64_t member, int64_t layer, int64_t row) {
  C* inverses = static_cast<C*>(s.inverses);
  return rows_of(inverses, s.inverses_member, 1, s, member, layer / s.block.layers, row);
}

// The operand of a layer of a block that is not plain, made of a panel of what comes before: of the stream,
// or of the layer before in the same block.
template <class T, int V, class C = Compute<T>>
void make_operand(const Stack& s, const C* before, const Tile<T>& tile, int64_t panel, int64_t valid,
                  int64_t member, int64_t layer, int64_t row) {
  const int64_t n = s.n, width = tile.width, size = panel * tile.features * width;
  const bool activate = s.block.activate_first, norm = s.block.norm && layer % s.block.layers == 0;
  const Vec<C> p = broadcast(C(activate ? s.p : 1)), minus_q = broadcast(C(activate ? -s.q : 1));
  T* rows = input_rows<T>(s, member, layer, row);
  C* inverses = norm ? inverse_rows<C>(s, member, layer, row) : nullptr;
  uint8_t* signs = activate ? sign_rows(s, member, layer, row) : nullptr;
  Lane<C>* words = tile.words + panel * tile.groups * width;
  if (signs) std::memset(words, 0, size_t(tile.groups * width) * sizeof(Lane<C>));

  for (int v = 0; v < V; ++v) {
    const int64_t lane = v * kLanes<C>;
    const C* x = before + size + lane;
    Vec<C> mean{}, inverse = broadcast(C(1));
    if (norm) {
      if (s.block.center) mean = sum_of<C>(n, [&](int64_t f) { return load(x + f * width); }) / C(n);
      const Vec<C> squared = sum_of<C>(n, [&](int64_t f) {
        const Vec<C> centered = load(x + f * width) - mean;
        return centered * centered;
      });
      inverse = C(1) / square_root(squared / C(n) + C(kNormEps));
      if (inverses && lane < valid) store_some(inverses + lane, inverse, valid - lane);
    }
    for (int64_t f = 0; f < n; f += kLanes<C>) {
      Vec<C> square[kLanes<C>];
      Mask<C> bits{};
      for (int i = 0; i < kLanes<C>; ++i) {
        const Vec<C> z = (load(x + (f + i) * width) - mean) * inverse;
        const Mask<C> nonnegative = z >= Vec<C>{};
        square[i] = z * slope(nonnegative, p, minus_q);
        bits |= nonnegative & (Lane<C>(f + i < n) << i);
      }
      if (signs) add_signs<C>(bits, f, kLanes<C>, words + lane, width);
      put_operand<T, C>(tile.operand + terms<T>(size) + lane, f, width, square);
      if (rows) store_square(square, rows + lane * n, valid - lane, n, f, s.past_caches);
    }
  }
  if (signs) write_signs<C>(words, width, valid, n, signs);
}

template <class T, int V>
void forward_tile(const Stack& s, int64_t member, int64_t first, int64_t count, const Tile<T>& tile) {
  using C = Compute<T>;
  const int64_t n = s.n, width = tile.width, size = tile.features * width;
  const bool activate = !s.block.activate_first, signs = s.signs && activate;  // after the product
  const Vec<C> p = broadcast(C(activate ? s.p : 1)), minus_q = broadcast(C(activate ? -s.q : 1));
  const C scale = C(multiplier(s, member));
  const auto row = [&](int64_t panel) { return (first + panel) * width; };
  const auto valid = [&](int64_t panel) { return smaller(width, s.rows - row(panel)); };
  const auto make_operand_of = [&](const C* before, int64_t panel, int64_t layer) {
    make_operand<T, V>(s, before, tile, panel, valid(panel), member, layer, row(panel));
  };

  for (int64_t panel = 0; panel < count; ++panel) {
    const C* x = static_cast<const C*>(s.x) + (member * s.rows + row(panel)) * n;
    C* stream = tile.stream + panel * size;
    if (plain(s)) {
      Operand<T>* operand = tile.operand ? tile.operand + terms<T>(panel * size) : nullptr;
      T* inputs = input_rows<T>(s, member, 0, row(panel));
      load_panel<T, V>(x, valid(panel), n, width, stream, operand, inputs);
    } else {
      load_panel<T, V>(x, valid(panel), n, width, stream, nullptr, static_cast<T*>(nullptr));
      make_operand_of(tile.stream, panel, 0);
    }
    std::memset(tile.branch + panel * size + n * width, 0, size_t(size - n * width) * sizeof(C));
  }

  for (int64_t layer = s.layer_begin; layer < s.layer_end; ++layer) {
    const T* weight = static_cast<const T*>(s.weight) + member * s.weight_member + layer * s.weight_layer;
    std::memset(tile.sums, 0, size_t(count * width) * sizeof(C));
    std::memset(tile.words, 0, size_t(count * tile.groups * width) * sizeof(Lane<C>));

    for_blocks(0, n, [&](int64_t j, auto outputs) {
      constexpr int M = decltype(outputs)::value;
      const Operand<T>* rows = weight_rows(weight + j * n, n, M, tile.weights);
      for (int64_t panel = 0; panel < count; ++panel) {
        const Operand<T>* x;
        if constexpr (kSame<T>) x = (tile.operand ? tile.operand : tile.stream) + panel * size;
        else x = tile.operand + terms<T>(panel * size);
        outlined([&] {
          Vec<C> h[M][V]{}, sums[V]{};
          Mask<C> bits[V]{};
          multiply(h, terms<T>(n), rows, terms<T>(n), 1, x, width, weight + (j + M) * n, M * kTerms<T>);

          C* branch = tile.branch + panel * size + j * width;
          for_each<M, V>([&](int m, int v) {
            const Mask<C> nonnegative = h[m][v] >= Vec<C>{};
            const Vec<C> z = h[m][v] * slope(nonnegative, p, minus_q);
            store(branch + m * width + v * kLanes<C>, z);
            sums[v] += z;
            bits[v] |= nonnegative & Lane<C>(1 << m);
          });
          add_sums<C, V>(tile.sums + panel * width, sums);
          Lane<C>* words = tile.words + panel * tile.groups * width;
          for (int v = 0; v < V; ++v)
            if (signs) add_signs<C>(bits[v], j, M, words + v * kLanes<C>, width);
        });
      }
    });

    const int64_t next = layer + 1;
    for (int64_t panel = 0; panel < count; ++panel) {
      if (signs)
        write_signs<C>(tile.words + panel * tile.groups * width, width, valid(panel), n,
                       sign_rows(s, member, layer, row(panel)));
      if (next == s.layer_end) {
        C* y = static_cast<C*>(s.y) + (member * s.rows + row(panel)) * n;
        finish_panel<T, V>(s, scale, tile, panel, valid(panel), y);
      } else if (next % s.block.layers) {
        make_operand_of(tile.branch, panel, next);
      } else {
        T* inputs = plain(s) ? input_rows<T>(s, member, next, row(panel)) : nullptr;
        finish_panel<T, V>(s, scale, tile, panel, valid(panel), inputs, s.past_caches);
        if (!plain(s)) make_operand_of(tile.stream, panel, next);
      }
    }
  }
}

// The slopes p and -q of phi.
template <class C> struct Slopes { C p, minus_q; };

// d = scale * (g - mean g) * phi'(h) for a panel of g, as the operand of the product and, where `kept` is
// given, for the weight gradient.
template <class T, int V, class C = Compute<T>>
void branch_gradient(const Stack& s, const C* gradient_of, C scale, bool mean_subtract, Slopes<C> phi,
                     const Tile<T>& tile, int64_t panel, Operand<T>* operand, bfloat16* kept) {
  const int64_t size = panel * tile.features * tile.width;
  const Lane<C>* words = tile.words + panel * tile.groups * tile.width;
  const Vec<C> p = broadcast(phi.p), minus_q = broadcast(phi.minus_q), factor = broadcast(scale);
  for (int v = 0; v < V; ++v) {
    const int64_t lane = v * kLanes<C>;
    const Vec<C> mean = mean_subtract ? load(tile.sums + panel * tile.width + lane) / C(s.n) : Vec<C>{};
    for (int64_t group = 0; group < s.n; group += kGroup) {
      const int64_t end = smaller(group + kGroup, s.n);
      Mask<C> word;
      std::memcpy(&word, words + group / kGroup * tile.width + lane, sizeof word);
      const auto gradient = [&](int64_t j) {  // for one j of the group after another
        const Mask<C> nonnegative = (word & 1) != 0;
        word >>= 1;
        const Vec<C> g = load(gradient_of + size + j * tile.width + lane);
        return residual_gradient(g, mean, factor, slope(nonnegative, p, minus_q));
      };
      if constexpr (kTerms<T> == 2) {
        for (int64_t j = group; j < end; j += 2) {
          const Word first = to_bfloat16(gradient(j));
          const Word second = j + 1 < end ? to_bfloat16(gradient(j + 1)) : Word{};
          const Word pair = first | second << 16;
          std::memcpy(operand + j / 2 * tile.width + lane, &pair, sizeof pair);
          if (kept) {
            narrow(&kept[j * tile.width + lane].bits, first);
            if (j + 1 < end) narrow(&kept[(j + 1) * tile.width + lane].bits, second);
          }
        }
      } else {
        for (int64_t j = group; j < end; ++j)
          store(operand + j * tile.width + lane, rounded<T>(gradient(j)));
      }
    }
  }
}

// The type in which d is kept for the weight gradient.
template <class T> using Kept = std::conditional_t<kTerms<T> == 2, T, Compute<T>>;

// The sums over the features of the stream's gradient, in the order in which a product adds them to it.
template <class T, int V, class C = Compute<T>>
void sum_stream(int64_t n, int64_t count, const Tile<T>& tile) {
  std::memset(tile.sums, 0, size_t(count * tile.width) * sizeof(C));
  for (int64_t begin = 0; begin < n; begin += kStage)
    for_blocks(begin, smaller(begin + kStage, n), [&](int64_t k, auto outputs) {
      for (int64_t panel = 0; panel < count; ++panel) {
        const C* stream = tile.stream + (panel * tile.features + k) * tile.width;
        Vec<C> sums[V]{};
        for_each<decltype(outputs)::value, V>(
            [&](int m, int v) { sums[v] += load(stream + m * tile.width + v * kLanes<C>); });
        add_sums<C, V>(tile.sums + panel * tile.width, sums);
      }
    });
}

// Adds the gradient of the x that a block begins with to the stream's, `inner` being that of phi(x).
template <class T, int V, class C = Compute<T>>
void add_activated(const Stack& s, const Tile<T>& tile, int64_t panel) {
  const int64_t width = tile.width, size = panel * tile.features * width;
  const Vec<C> p = broadcast(C(s.p)), minus_q = broadcast(C(-s.q));
  for (int64_t j = 0; j < s.n; ++j) {
    const Lane<C>* words = tile.words + (panel * tile.groups + j / kGroup) * width;
    for (int v = 0; v < V; ++v) {
      const int64_t at = j * width + v * kLanes<C>;
      Mask<C> word;
      std::memcpy(&word, words + v * kLanes<C>, sizeof word);
      const Mask<C> nonnegative = (word >> int(j % kGroup) & 1) != 0;
      C* stream = tile.stream + size + at;
      store(stream, load(stream) + load(tile.inner + size + at) * slope(nonnegative, p, minus_q));
    }
  }
}

// The same where `inner`, with its sums over the features, is the gradient of y, the normalized x.
template <class T, int V, class C = Compute<T>>
void add_normalized(const Stack& s, const Tile<T>& tile, int64_t panel, int64_t valid, const T* y_rows,
                    const C* inverses) {
  const int64_t n = s.n, width = tile.width, size = panel * tile.features * width;
  load_panel<T, V>(y_rows, valid, n, width, tile.branch + size, nullptr, static_cast<T*>(nullptr));
  for (int v = 0; v < V; ++v) {
    const int64_t lane = v * kLanes<C>;
    C* stream = tile.stream + size + lane;
    const C *inner = tile.inner + size + lane, *y = tile.branch + size + lane;
    const Vec<C> along =
        sum_of<C>(n, [&](int64_t f) { return load(inner + f * width) * load(y + f * width); }) / C(n);
    const Vec<C> mean = s.block.center ? load(tile.sums + panel * width + lane) / C(n) : Vec<C>{};
    const Vec<C> inverse = lane < valid ? load_some(inverses + lane, valid - lane) : Vec<C>{};
    for (int64_t f = 0; f < n * width; f += width)
      store(stream + f, load(stream + f) + inverse * (load(inner + f) - mean - load(y + f) * along));
  }
}

template <class T, int V>
void backward_tile(const Stack& s, int64_t member, int64_t first, int64_t count, const Tile<T>& tile) {
  using C = Compute<T>;
  const int64_t n = s.n, width = tile.width, size = tile.features * width;
  const bool norm = s.block.norm, activate_first = s.block.activate_first;
  const C scale = C(multiplier(s, member));
  const Slopes<C> phi = {C(s.p), C(-s.q)};
  const auto row = [&](int64_t panel) { return (first + panel) * width; };
  const auto valid = [&](int64_t panel) { return smaller(width, s.rows - row(panel)); };
  const auto read_signs_of = [&](int64_t panel, int64_t layer) {
    read_signs<C>(sign_rows(s, member, layer, row(panel)), width, valid(panel), n,
                  tile.words + panel * tile.groups * width);
  };

  for (int64_t panel = 0; panel < count; ++panel) {
    const C* grad = static_cast<const C*>(s.x) + (member * s.rows + row(panel)) * n;
    load_panel<T, V>(grad, valid(panel), n, width, tile.stream + panel * size, nullptr,
                     static_cast<T*>(nullptr));
  }
  sum_stream<T, V>(n, count, tile);

  for (int64_t layer = s.layer_end - 1; layer >= s.layer_begin; --layer) {
    const T* weight = static_cast<const T*>(s.weight) + member * s.weight_member + layer * s.weight_layer;
    Kept<T>* kept = nullptr;
    if (s.d) kept = static_cast<Kept<T>*>(s.d) + (kept_panels(s, member, layer) + first) * n * width;
    const auto operand = [&](int64_t panel) -> Operand<T>* {
      if constexpr (kTerms<T> == 2) return tile.operand + terms<T>(panel * size);
      else return kept ? kept + panel * n * width : tile.branch + panel * size;
    };

    const bool first_of_block = layer % s.block.layers == 0;
    const bool last_of_block = (layer + 1) % s.block.layers == 0;
    for (int64_t panel = 0; panel < count; ++panel) {
      bfloat16* half = nullptr;
      if constexpr (kTerms<T> == 2) half = kept ? kept + panel * n * width : nullptr;
      const bool activated = !(activate_first && last_of_block);  // after this layer
      if (activated) read_signs_of(panel, activate_first ? layer + 1 : layer);
      const Slopes<C> slopes = activated ? phi : Slopes<C>{1, 1};
      if (last_of_block)
        branch_gradient<T, V>(s, tile.stream, scale, s.mean_subtract, slopes, tile, panel, operand(panel),
                              half);
      else
        branch_gradient<T, V>(s, tile.inner, C(1), false, slopes, tile, panel, operand(panel), half);
    }

    const bool to_stream = first_of_block && !norm && !activate_first;
    C* target = to_stream ? tile.stream : tile.inner;
    if (!to_stream) std::memset(target, 0, size_t(count * size) * sizeof(C));
    std::memset(tile.sums, 0, size_t(count * width) * sizeof(C));
    for (int64_t j = 0; j < n; j += kPiece<T>) {
      const int64_t length = smaller(kPiece<T>, n - j);
      const T* rows = weight + j * n;
      const T* next_rows = rows + length * n;
      if (j + length == n) next_rows = layer > s.layer_begin ? weight - s.weight_layer : weight;
      for (int64_t begin = 0; begin < n; begin += kStage) {
        const int64_t end = smaller(begin + kStage, n);
        if constexpr (!kSame<T>) stage(rows + begin, n, length, end - begin, tile.weights, kStage);
        for_blocks(begin, end, [&](int64_t k, auto outputs) {
          constexpr int M = decltype(outputs)::value;
          const Operand<T>* columns;
          if constexpr (kSame<T>) columns = rows + k;
          else columns = tile.weights + (k - begin);
          const int64_t step = kSame<T> ? n : kStage;
          const T* next = k + kAhead<T> < n ? rows + k + kAhead<T> : next_rows + (k + kAhead<T> - n);
          for (int64_t panel = 0; panel < count; ++panel)
            outlined([&] {
              Vec<C> g[M][V]{}, sums[V]{};
              multiply(g, terms<T>(length), columns, 1, step, operand(panel) + terms<T>(j) * width, width,
                       next, n);
              for_each<M, V>([&](int m, int v) {
                C* sum = target + panel * size + (k + m) * width + v * kLanes<C>;
                g[m][v] += load(sum);
                store(sum, g[m][v]);
                sums[v] += g[m][v];
              });
              if (j + length == n) add_sums<C, V>(tile.sums + panel * width, sums);
            });
        });
      }
    }

    if (to_stream || !first_of_block) continue;
    for (int64_t panel = 0; panel < count; ++panel) {
      if (norm) {
        add_normalized<T, V>(s, tile, panel, valid(panel), input_rows<T>(s, member, layer, row(panel)),
                             inverse_rows<C>(s, member, layer, row(panel)));
      } else {
        read_signs_of(panel, layer);
        add_activated<T, V>(s, tile, panel);
      }
    }
    sum_stream<T, V>(n, count, tile);
  }

  for (int64_t panel = 0; panel < count; ++panel)
    for (int v = 0; v < V; ++v) {
      const int64_t row0 = row(panel) + v * kLanes<C>;
      for (int64_t f = 0; f < n; f += kLanes<C>) {
        Vec<C> square[kLanes<C>];
        for (int i = 0; i < kLanes<C>; ++i)
          square[i] = load(tile.stream + panel * size + (f + i) * width + v * kLanes<C>);
        store_square(square, static_cast<C*>(s.y) + (member * s.rows + row0) * n, s.rows - row0, n, f);
      }
    }
}

template <class T, bool Forward>
void pass(const Stack& s, int64_t begin, int64_t end, void* workspace) {
  Cutter cut{reinterpret_cast<uintptr_t>(workspace)};
  const Tile<T> tile(s, cut);
  const int64_t most = tile_panels(s, sizeof(Compute<T>));
  while (begin < end) {
    const int64_t member = begin / panels_of(s), first = begin % panels_of(s);
    const int64_t count = smaller(smaller(end - begin, panels_of(s) - first), most);
    with_count<kVectors>(s.panel / kLanes<Compute<T>>, [&](auto vectors) {
      if constexpr (Forward) forward_tile<T, decltype(vectors)::value>(s, member, first, count, tile);
      else backward_tile<T, decltype(vectors)::value>(s, member, first, count, tile);
    });
    begin += count;
  }
  fence();
}

// The weight gradient goes through strips of columns.
template <class C> constexpr int64_t kStrip = kVectors * kLanes<C>;

template <class T, class C = Compute<T>>
struct Strip {
  Operand<T>* x;  // [terms(rows)][kStrip]
  C* sums;        // [n][kStrip]
  Strip(const Stack& s, Cutter& cut) {
    x = cut.take<Operand<T>>((kRowChunk + s.panel) * kStrip<C>);
    sums = cut.take<C>(s.n * kStrip<C>);
  }
};

template <class T, int V>
void weight_strip(const Stack& s, int64_t member, int64_t layer, int64_t column, int64_t begin, int64_t end,
                  const Strip<T>& strip) {
  using C = Compute<T>;
  const int64_t n = s.n, width = s.panel, columns = smaller(kStrip<C>, n - column);
  const T* x = static_cast<const T*>(s.inputs) + member * s.inputs_member + layer * s.rows * n + column;
  T* out = static_cast<T*>(s.weight_grad) + member * s.weight_grad_member + layer * n * n + column;
  const auto* d = static_cast<const Operand<T>*>(s.d);
  d += terms<T>(kept_panels(s, member, layer) * n * width);
  const int64_t chunk = blocks_of(width, kRowChunk) * width;

  for (int64_t row0 = 0; row0 < s.rows || row0 == 0; row0 += chunk) {
    const int64_t rows = smaller(chunk, s.rows - row0);
    const bool last = row0 + chunk >= s.rows;
    stage(x + row0 * n, n, rows, columns, strip.x, kStrip<C>);
    for_blocks(begin, end, [&](int64_t j, auto outputs) {
      constexpr int M = decltype(outputs)::value;
      outlined([&] {
        Vec<C> sums[M][V];
        for_each<M, V>([&](int m, int v) {
          __builtin_prefetch(out + (j + m) * n + v * kLanes<C>, 1);
          sums[m][v] = row0 ? load(strip.sums + (j + m) * kStrip<C> + v * kLanes<C>) : Vec<C>{};
        });
        for (int64_t row = 0; row < rows; row += width)
          multiply(sums, terms<T>(smaller(width, rows - row)), d + terms<T>((row0 + row) * n + j * width),
                   terms<T>(width), 1, strip.x + terms<T>(row) * kStrip<C>, kStrip<C>);
        for_each<M, V>([&](int m, int v) {
          const int64_t k = v * kLanes<C>;
          if (last) store_some(out + (j + m) * n + k, sums[m][v], columns - k);
          else store(strip.sums + (j + m) * kStrip<C> + k, sums[m][v]);
        });
      });
    });
  }
}

template <class T>
void backward_weight(const Stack& s, int64_t begin, int64_t end, void* workspace) {
  using C = Compute<T>;
  Cutter cut{reinterpret_cast<uintptr_t>(workspace)};
  const Strip<T> strip(s, cut);
  const int64_t strips = blocks_of(kStrip<C>, s.n);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t share = task % s.shares, column = task / s.shares % strips * kStrip<C>;
    const int64_t index = task / s.shares / strips, layers = s.layer_end - s.layer_begin;
    const int64_t first = s.n * share / s.shares, last = s.n * (share + 1) / s.shares;
    with_count<kVectors>(blocks_of(kLanes<C>, s.n - column), [&](auto vectors) {
      weight_strip<T, decltype(vectors)::value>(s, index / layers, s.layer_begin + index % layers, column,
                                                first, last, strip);
    });
  }
}

template <class T>
int64_t workspace(const Stack& s) {
  Cutter tile{0}, strip{0};
  Tile<T>(s, tile);
  Strip<T>(s, strip);
  return int64_t(tile.at > strip.at ? tile.at : strip.at);
}

template <class T>
constexpr StackKernel kernel() {
  return {kLanes<Compute<T>>, kVectors, kOutputs, int(sizeof(T)), int(sizeof(Kept<T>)), workspace<T>,
          pass<T, true>, pass<T, false>, backward_weight<T>};
}

}  // namespace

#if defined(DEPTHNET_ISA_AVX512_BF16)
const StackKernel residual_stack_bfloat16 = kernel<bfloat16>();
#else
const StackKernel residual_stack[kDTypes] = {kernel<float>(), kernel<double>(), kernel<bfloat16>(),
                                             kernel<float16>()};
#endif

}  // namespace DEPTHNET_ISA
}  // namespace depthnet
