// What the tests ask of fp8pack.hpp, from the command line. Exit code 3 and one sentence on stderr: refused.
//
//   read_checkpoint files < PATHS          one JSON line for each safetensors file: its tensors, or {"error": "..."}
//   read_checkpoint checkpoints < PATHS    one JSON line for each checkpoint: its packed weights, or {"error": "..."}
//   read_checkpoint weights PATH           the same of one checkpoint
//   read_checkpoint dequantize PATH NAME   the weight as raw F32 on stdout
//   read_checkpoint bfloat16 PATH NAME     the weight as raw BF16
//   read_checkpoint scales PATH NAME       the scales as cuBLASLt reads them
//   read_checkpoint kv PATH                the scales of K and V, as JSON
//   read_checkpoint product PATH NAME      relative errors of the example's product on the host, and of its activation
//   read_checkpoint e4m3 < F32             raw floats as raw E4M3 bytes, by the example's quantizer
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>

#include "../../examples/cublaslt/activation.hpp"
#include "fp8pack.hpp"

namespace {

std::string json(const std::string& text) {
    std::string result = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') {
            result += '\\';
        }
        result += letter;  // names hold no control characters, and errors are printable
    }
    return result + "\"";
}

std::string tensors_of(const std::string& path) {
    const fp8pack::SafetensorsFile file(path);
    std::ostringstream line;
    line << "{\"tensors\": [";
    for (const fp8pack::Tensor& tensor : file.tensors()) {
        line << (&tensor == &file.tensors().front() ? "" : ", ") << "[" << json(tensor.name) << ", "
             << json(tensor.dtype) << ", " << fp8pack::detail::to_text(tensor.shape) << ", " << tensor.begin << ", "
             << tensor.end << "]";
    }
    line << "]}";
    return line.str();
}

std::string weights_of(const std::string& path) {
    fp8pack::Checkpoint opened(path);
    const fp8pack::Checkpoint checkpoint = std::move(opened);  // pointers into the files survive a move
    const char* modes[] = {"tensor", "channel", "block128", "mx", "none"};
    std::ostringstream line;
    line.precision(9);
    line << "{";
    for (const auto& [name, weight] : checkpoint.weights()) {
        const fp8pack::GemmMode mode = fp8pack::gemm_mode(weight.granularity);
        const auto [n, k] = fp8pack::padded_shape(weight.n, weight.k, mode);
        line << (line.tellp() > 1 ? ", " : "") << json(name) << ": {\"file\": " << json(weight.file)
             << ", \"granularity\": " << json(weight.granularity.name) << ", \"shape\": [" << weight.n << ", "
             << weight.k << "], \"block\": [" << weight.block_rows << ", " << weight.block_cols
             << "], \"source_dtype\": " << json(weight.source_dtype) << ", \"scale\": " << json(weight.stored_scale.name)
             << ", \"tiled\": " << (weight.tiled ? "true" : "false") << ", \"mode\": \""
             << modes[static_cast<int>(mode)] << "\", \"padded\": [" << n << ", " << k << "], \"input_scale\": ";
        weight.input_scale ? line << *weight.input_scale << "}" : line << "null}";
    }
    line << "}";
    return line.str();
}

void print_lines(const std::function<std::string(const std::string&)>& describe) {
    for (std::string path; std::getline(std::cin, path);) {
        try {
            std::cout << describe(path) << "\n";
        } catch (const fp8pack::Error& error) {
            std::cout << "{\"error\": " << json(error.what()) << "}\n";
        }
    }
}

template <typename Element>
void print_raw(const std::vector<Element>& values) {
    std::fwrite(values.data(), sizeof(Element), values.size(), stdout);
}

void print_e4m3() {
    const std::string raw((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
    std::vector<float> values(raw.size() / sizeof(float));
    std::memcpy(values.data(), raw.data(), values.size() * sizeof(float));
    std::vector<std::uint8_t> codes(values.size());
    std::transform(values.begin(), values.end(), codes.begin(), to_e4m3);
    print_raw(codes);
}

void print_kv(const fp8pack::Checkpoint& checkpoint) {
    std::cout.precision(9);
    std::cout << "{";
    for (const auto& [point, scale] : checkpoint.kv_scales()) {
        std::cout << (point == checkpoint.kv_scales().begin()->first ? "" : ", ") << json(point) << ": " << scale;
    }
    std::cout << "}\n";
}

void print_product(const fp8pack::PackedWeight& weight) {
    const std::uint64_t tokens = 16;
    const std::vector<float> values = random_values(tokens * weight.k);
    const Activation activation = quantize(values, tokens, weight);
    const std::array<float, 256> table = fp8pack::value_table(fp8pack::Format::e4m3);
    std::vector<float> rounded(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint64_t row = i / weight.k, col = i % weight.k;
        rounded[i] = table[activation.payload[row * activation.k + col]] * activation.scale_at(row, col);
    }
    std::cout << error_of(emulate(weight, activation), reference(weight, activation)) << " "
              << error_of(rounded, std::vector<double>(values.begin(), values.end())) << "\n";
}

int run(const std::vector<std::string>& arguments) {
    const std::string command = arguments.empty() ? "" : arguments[0];
    if (command == "files") {
        print_lines(tensors_of);
    } else if (command == "checkpoints") {
        print_lines(weights_of);
    } else if (command == "e4m3") {
        print_e4m3();
    } else if (command == "weights" && arguments.size() == 2) {
        std::cout << weights_of(arguments[1]) << "\n";
    } else if (command == "kv" && arguments.size() == 2) {
        print_kv(fp8pack::Checkpoint(arguments[1]));
    } else if (arguments.size() == 3) {
        const fp8pack::Checkpoint checkpoint(arguments[1]);
        const fp8pack::PackedWeight& weight = checkpoint.at(arguments[2]);
        command == "product"    ? print_product(weight)
        : command == "scales"   ? print_raw(fp8pack::gemm_scales(weight))
        : command == "bfloat16" ? print_raw(fp8pack::dequantize_bfloat16(weight))
                                : print_raw(fp8pack::dequantize(weight));
    } else {
        return 2;
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run({arguments + 1, arguments + count});
    } catch (const fp8pack::Error& error) {
        std::cerr << error.what() << "\n";
        return 3;
    }
}
