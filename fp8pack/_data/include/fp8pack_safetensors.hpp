// fp8pack_safetensors.hpp: a strict, bounded reader of safetensors files. C++17 and POSIX, no dependency.
//
// Its rules are those of fp8pack's Python reader (checkpoint/header.py): tensors tile the data section without holes,
// names are unique and printable, numbers are whole and fit. Every length and offset is checked before it is used; what
// is wrong is an fp8pack::Error of one sentence. Files are mapped, so they must not be cut short while they are open.
// Source of the format: https://huggingface.co/docs/safetensors/index#format
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <locale>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

static_assert(sizeof(std::size_t) == 8, "fp8pack.hpp maps files of many gigabytes: it needs a 64-bit host");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors files are little-endian, and fp8pack.hpp reads them as they lie"
#endif

namespace fp8pack {

// A checkpoint that is refused; what() is one sentence that names file, tensor and problem.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Shape = std::vector<std::uint64_t>;

// A tensor of a safetensors file; begin and end are offsets in the file, data lies in the mapped file.
struct Tensor {
    std::string name, dtype, file;
    Shape shape;
    std::uint64_t begin = 0, end = 0;
    const std::uint8_t* data = nullptr;

    std::size_t nbytes() const { return end - begin; }
};

namespace detail {

constexpr std::uint64_t max_header_nbytes = 100'000'000;  // the safetensors library's own limit
constexpr std::uint64_t max_manifest_nbytes = std::uint64_t{1} << 30;
constexpr std::uint64_t max_dim = std::uint64_t{1} << 48;
constexpr std::uint64_t max_size = std::uint64_t{1} << 63;
constexpr std::size_t max_rank = 64;
constexpr std::size_t max_name = 4096;
constexpr std::size_t max_digits = 4300;  // Python's own limit for integers
constexpr std::size_t max_depth = 64;

// A name for an error message: printable ASCII, on one line, not too long.
inline std::string quoted(std::string_view text) {
    const char* digits = "0123456789abcdef";
    std::string result = "'";
    for (const char letter : text.substr(0, 200)) {
        const auto byte = static_cast<unsigned char>(letter);
        if (byte >= 0x20 && byte < 0x7f) {
            result += letter;
        } else {
            result += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
        }
    }
    return result + "'";
}

inline std::string to_text(const Shape& shape) {
    std::string result = "[";
    for (const std::uint64_t dim : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(dim);
    return result + "]";
}

// Returns false if the product does not fit.
inline bool multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& product) {
    product = a * b;
    return a == 0 || product / a == b;
}

inline std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Strict UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF. Returns the number of characters.
inline std::optional<std::size_t> count_utf8(std::string_view text) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < text.size(); ++count) {
        const auto lead = static_cast<unsigned char>(text[i]);
        if (lead < 0x80) {
            ++i;
            continue;
        }
        const std::size_t length = lead < 0xc2   ? 0
                                   : lead < 0xe0 ? 2
                                   : lead < 0xf0 ? 3
                                   : lead < 0xf5 ? 4
                                                 : 0;
        if (length == 0 || length > text.size() - i) return std::nullopt;
        std::uint32_t code = lead & (0x7fu >> length);
        for (std::size_t j = 1; j < length; ++j) {
            const auto byte = static_cast<unsigned char>(text[i + j]);
            if ((byte & 0xc0) != 0x80) return std::nullopt;
            code = code << 6 | (byte & 0x3fu);
        }
        const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
        if (overlong || (code >= 0xd800 && code < 0xe000) || code > 0x10ffff) return std::nullopt;
        i += length;
    }
    return count;
}

inline void append_utf8(std::string& text, std::uint32_t code) {
    const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (code >> shift & 0x3f)); };
    if (code < 0x80) {
        text += static_cast<char>(code);
    } else if (code < 0x800) {
        text += static_cast<char>(0xc0 | code >> 6);
        tail(0);
    } else if (code < 0x10000) {
        text += static_cast<char>(0xe0 | code >> 12);
        tail(6), tail(0);
    } else {
        text += static_cast<char>(0xf0 | code >> 18);
        tail(12), tail(6), tail(0);
    }
}

// The double nearest to a JSON number; infinite if it is too large. Not strtod: that obeys the host's locale.
inline double to_double(std::string_view number) {
    std::istringstream stream{std::string(number)};
    stream.imbue(std::locale::classic());
    double value = 0;
    const bool fits = static_cast<bool>(stream >> value);
    return fits || std::fabs(value) < 1 ? value : std::numeric_limits<double>::infinity();
}

// Reads JSON from front to back without building a document: in memory are the keys of open objects, and what the
// caller keeps.
// Stricter than many: no duplicate keys, no lone surrogates, no NaN, no -0 as a whole number, 64 levels.
class JsonReader {
public:
    JsonReader(std::string_view text, std::string what) : text_(text), what_(std::move(what)) {
        if (!count_utf8(text)) fail("it is not UTF-8");
    }

    [[noreturn]] void fail(const std::string& problem) const {
        throw Error(what_ + " is malformed: " + problem + " (at byte " + std::to_string(at_) + ")");
    }

    char peek() {
        while (at_ < text_.size() && is_space(text_[at_])) ++at_;
        return at_ < text_.size() ? text_[at_] : '\0';
    }

    // Calls member(key) for each member; it must read the value.
    template <typename Member>
    void object(Member member) {
        std::set<std::string> seen;
        begin('{');
        while (!ends('}', seen.empty())) {
            std::string key = text(false);
            expect(':');
            const auto [place, is_new] = seen.insert(std::move(key));
            if (!is_new) fail(quoted(*place) + " appears twice");
            member(*place);
        }
    }

    // Calls element() for each element; it must read the value.
    template <typename Element>
    void array(Element element) {
        bool is_first = true;
        begin('[');
        for (; !ends(']', is_first); is_first = false) element();
    }

    std::string text() { return text(true); }

    std::optional<std::string> text_or_null() {
        if (peek() == 'n') {
            word("null");
            return std::nullopt;
        }
        return text();
    }

    std::uint64_t whole() {
        const std::string_view token = number();
        std::uint64_t value = 0;
        for (const char letter : token) {
            const std::uint64_t digit = static_cast<unsigned char>(letter) - std::uint64_t{'0'};
            if (digit > 9 || !multiply(value, 10, value) || value + digit < value) {
                fail("a whole number that fits 64 bits is expected");
            }
            value += digit;
        }
        return value;
    }

    Shape wholes(std::size_t at_most) {
        Shape values;
        array([&] {
            values.push_back(whole());
            if (values.size() > at_most) fail("more than " + std::to_string(at_most) + " numbers");
        });
        return values;
    }

    void skip() {
        switch (peek()) {
            case '{': return object([this](const std::string&) { skip(); });
            case '[': return array([this] { skip(); });
            case '"': return static_cast<void>(text());
            case 't': return word("true");
            case 'f': return word("false");
            case 'n': return word("null");
            default: number();
        }
    }

    void word(std::string_view expected) {
        check_depth();
        peek();
        if (text_.substr(at_, expected.size()) != expected) fail("no JSON value");
        at_ += expected.size();
    }

    void finish() {
        if (peek() != '\0' || at_ != text_.size()) fail("something follows the document");
    }

private:
    void check_depth() const {
        if (depth_ > max_depth) fail("it is nested too deep");
    }

    void expect(char letter) {
        if (peek() != letter) fail(std::string("expected ") + letter);
        ++at_;
    }

    void begin(char bracket) {
        check_depth();
        expect(bracket);
        ++depth_;
    }

    bool ends(char bracket, bool is_first) {
        if (peek() != bracket) {
            if (!is_first) expect(',');
            return false;
        }
        ++at_;
        --depth_;
        return true;
    }

    std::string text(bool is_value) {
        if (is_value) check_depth();
        expect('"');
        std::string result;
        while (true) {
            const std::size_t run = at_;
            while (at_ < text_.size() && is_plain(text_[at_])) ++at_;
            result.append(text_, run, at_ - run);
            if (at_ == text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) {
                fail("a text that does not end, or holds a control character");
            }
            if (text_[at_++] == '"') return result;
            escape(result);
        }
    }

    static bool is_space(char letter) { return letter == ' ' || letter == '\t' || letter == '\n' || letter == '\r'; }

    static bool is_plain(char letter) {
        return letter != '"' && letter != '\\' && static_cast<unsigned char>(letter) >= 0x20;
    }

    void escape(std::string& result) {
        const char letter = at_ < text_.size() ? text_[at_++] : '\0';
        const std::string_view letters = "\"\\/bfnrt";
        const std::size_t found = letters.find(letter);
        if (letter != '\0' && found != std::string_view::npos) {
            result += "\"\\/\b\f\n\r\t"[found];
            return;
        }
        if (letter != 'u') fail("an escape that is not known");
        std::uint32_t code = hex4();
        if (code >= 0xd800 && code < 0xe000) {
            const bool is_pair = code < 0xdc00 && text_.substr(at_, 2) == "\\u";
            at_ += is_pair ? 2 : 0;
            const std::uint32_t low = is_pair ? hex4() : 0;
            if (low < 0xdc00 || low >= 0xe000) fail("a surrogate without its other half");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
        append_utf8(result, code);
    }

    std::uint32_t hex4() {
        std::uint32_t code = 0;
        for (int i = 0; i < 4; ++i) {
            const char letter = at_ < text_.size() ? text_[at_++] : '\0';
            const std::size_t digit = std::string_view("0123456789abcdefABCDEF").find(letter);
            if (digit == std::string_view::npos) fail("an escape without four digits");
            code = code << 4 | static_cast<std::uint32_t>(digit < 16 ? digit : digit - 6);
        }
        return code;
    }

    std::size_t digits() {
        const std::size_t begin = at_;
        while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
        return at_ - begin;
    }

    bool take(std::string_view letters) {
        const bool found = at_ < text_.size() && letters.find(text_[at_]) != std::string_view::npos;
        at_ += found ? 1 : 0;
        return found;
    }

    std::string_view number() {
        check_depth();
        peek();
        const std::size_t begin = at_;
        const bool is_negative = take("-");
        const bool is_zero = at_ < text_.size() && text_[at_] == '0';
        const std::size_t whole = is_zero ? static_cast<std::size_t>(take("0")) : digits();
        bool is_whole = true, is_complete = whole > 0;
        if (take(".")) {
            is_whole = false;
            is_complete = is_complete && digits() > 0;
        }
        if (is_complete && take("eE")) {
            is_whole = false;
            take("+-");
            is_complete = digits() > 0;
        }
        const std::string_view token = text_.substr(begin, at_ - begin);
        if (!is_complete || (is_whole && ((is_negative && is_zero) || whole > max_digits))) {
            fail("no JSON value, -0, or a whole number of thousands of digits");
        }
        if (!is_whole && std::isinf(to_double(token))) fail("a number that is too large");
        return token;
    }

    std::string_view text_;
    std::string what_;
    std::size_t at_ = 0, depth_ = 0;
};

// A file mapped read-only.
class Mapping {
public:
    explicit Mapping(const std::string& path, const std::string& file) {
        const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not hang
        if (fd < 0) throw Error(file + " cannot be opened: " + std::strerror(errno));
        struct stat status = {};
        const bool is_regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
        size_ = is_regular ? static_cast<std::size_t>(status.st_size) : 0;
        void* mapped = size_ > 0 ? ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
        ::close(fd);
        if (!is_regular || mapped == MAP_FAILED) {
            throw Error(file + (is_regular ? " cannot be mapped" : " is no regular file"));
        }
        data_ = static_cast<const std::uint8_t*>(mapped);
    }

    Mapping(Mapping&& other) noexcept { *this = std::move(other); }
    Mapping& operator=(Mapping&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Mapping() {
        if (data_ != nullptr) ::munmap(const_cast<std::uint8_t*>(data_), size_);
    }

    const std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

private:
    const std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
};

inline int bits_of(std::string_view dtype) {
    static const std::map<std::string_view, int> bits = {
        {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
        {"F8_E5M2FNUZ", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16}, {"U16", 16}, {"F16", 16},
        {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"I64", 64}, {"U64", 64}, {"F64", 64}, {"C64", 64}};
    const auto found = bits.find(dtype);
    return found == bits.end() ? 0 : found->second;
}

inline std::string base_name(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

inline bool ends_with(std::string_view text, std::string_view suffix) {
    return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

[[noreturn]] inline void refuse(const std::string& file, const std::string& name, const std::string& problem) {
    throw Error(file + ": tensor " + quoted(name) + " " + problem);
}

inline std::uint64_t count_of(const Shape& shape) {
    std::uint64_t count = 1;
    for (const std::uint64_t dim : shape) {
        count *= dim;  // read_entry checked that this fits
    }
    return count;
}

inline void check_name(const std::string& file, const std::string& name) {
    bool is_plain = !name.empty() && count_utf8(name).value_or(max_name + 1) <= max_name;
    for (std::size_t i = 0; i < name.size() && is_plain; ++i) {
        const auto byte = static_cast<unsigned char>(name[i]);
        const bool is_c1 = byte == 0xc2 && static_cast<unsigned char>(name[i + 1]) < 0xa0;  // U+0080 to U+009F
        is_plain = byte >= 0x20 && byte != 0x7f && !is_c1;
    }
    if (!is_plain) refuse(file, name, "has a name that is empty, over 4096 characters, or holds control characters");
}

inline void check_size(const Tensor& tensor) {
    const int bits = bits_of(tensor.dtype);
    std::uint64_t largest = 1, nbytes = 0;  // largest: 0 counts as 1, so that it hides no overflow beside it
    for (const std::uint64_t dim : tensor.shape) {
        if (dim > max_dim || !multiply(largest, std::max<std::uint64_t>(dim, 1), largest) || largest > max_size) {
            refuse(tensor.file, tensor.name, "has a shape that is too large");
        }
    }
    const std::uint64_t count = count_of(tensor.shape);
    const std::uint64_t last = count % 8 * static_cast<std::uint64_t>(bits);
    if (!multiply(count / 8, static_cast<std::uint64_t>(bits), nbytes) || last % 8 != 0 ||
        nbytes + last / 8 != tensor.nbytes()) {
        refuse(tensor.file, tensor.name, "spans " + std::to_string(tensor.nbytes()) + " bytes, which is not what " +
                                             tensor.dtype + " " + to_text(tensor.shape) + " needs");
    }
}

inline Tensor read_entry(JsonReader& json, const std::string& file, const std::string& name, std::uint64_t data_begin) {
    Tensor tensor;
    Shape offsets;
    bool has_dtype = false, has_shape = false;
    tensor.name = name;
    tensor.file = file;
    json.object([&](const std::string& field) {
        if (field == "dtype") {
            tensor.dtype = json.text();
            has_dtype = true;
        } else if (field == "shape") {
            tensor.shape = json.wholes(max_rank);
            has_shape = true;
        } else if (field == "data_offsets") {
            offsets = json.wholes(2);
        } else {
            json.skip();
        }
    });
    check_name(file, name);
    if (!has_dtype || !has_shape || offsets.size() != 2) refuse(file, name, "has no dtype, shape and data_offsets");
    if (bits_of(tensor.dtype) == 0) refuse(file, name, "has a dtype that is not known: " + quoted(tensor.dtype));
    if (offsets[0] > offsets[1] || offsets[1] > max_size) refuse(file, name, "has malformed data_offsets");
    tensor.begin = data_begin + offsets[0];
    tensor.end = data_begin + offsets[1];
    check_size(tensor);
    return tensor;
}

// Tensors, in the order of the file, must fill what lies between begin and size.
inline void check_tiling(const std::vector<Tensor>& tensors, const std::string& file, std::uint64_t begin,
                         std::uint64_t size) {
    for (const Tensor& tensor : tensors) {
        if (tensor.begin != begin) {
            const bool overlaps = tensor.begin < begin;
            refuse(file, tensor.name, overlaps ? "overlaps the tensor before it" : "leaves a hole before it");
        }
        begin = tensor.end;
    }
    if (begin != size) {
        throw Error(file + ": " + (size < begin ? "bytes are missing at its end" : "bytes follow the last tensor"));
    }
}

}  // namespace detail

// A safetensors file, mapped, its header read and checked. Tensors are in the order of the file; the strict rules are
// those of fp8pack's Python reader: tensors tile the data section, names are unique and printable, numbers are whole.
class SafetensorsFile {
public:
    explicit SafetensorsFile(const std::string& path) : name_(detail::base_name(path)), mapping_(path, name_) {
        const std::string_view text = mapping_.text();
        if (text.substr(0, 23) == "version https://git-lfs") {
            throw Error(name_ + " is a Git LFS pointer, not the file: run `git lfs pull`");
        }
        if (text.size() < 8 || text.substr(0, 4) == "GGUF") {
            throw Error(name_ + " has " + std::to_string(text.size()) + " bytes, or is GGUF: not a safetensors file");
        }
        std::uint64_t length = 0;
        std::memcpy(&length, text.data(), sizeof length);
        if (length < 2 || length > detail::max_header_nbytes || length > text.size() - 8) {
            throw Error(name_ + " has " + std::to_string(text.size()) + " bytes and claims a header of " +
                        std::to_string(length) + ": not a safetensors file, or damaged");
        }
        read_header(text.substr(8, length), 8 + length);
    }

    const std::string& name() const { return name_; }
    const std::vector<Tensor>& tensors() const { return tensors_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

private:
    void read_header(std::string_view raw, std::uint64_t data_begin) {
        detail::JsonReader json(raw, name_ + ": the header");
        json.object([&](const std::string& key) {
            if (key != "__metadata__") {
                tensors_.push_back(detail::read_entry(json, name_, key, data_begin));
            } else if (json.peek() == 'n') {
                json.word("null");
            } else {
                json.object([&](const std::string& field) { metadata_[field] = json.text(); });
            }
        });
        json.finish();
        std::stable_sort(tensors_.begin(), tensors_.end(), [](const Tensor& a, const Tensor& b) {
            return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
        });
        detail::check_tiling(tensors_, name_, data_begin, mapping_.size());
        for (Tensor& tensor : tensors_) tensor.data = mapping_.data() + tensor.begin;
    }

    std::string name_;
    detail::Mapping mapping_;
    std::vector<Tensor> tensors_;
    std::map<std::string, std::string> metadata_;
};

}  // namespace fp8pack
