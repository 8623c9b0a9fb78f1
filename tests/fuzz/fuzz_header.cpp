// libFuzzer for the C++ reader of headers: `make fuzz`. What is refused is an fp8pack::Error; all else is a finding.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "fp8pack_safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const int fd = memfd_create("fuzzed", 0);
    static const std::string path = "/proc/self/fd/" + std::to_string(fd);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) return 0;
    try {
        const fp8pack::SafetensorsFile file(path);
        volatile std::uint8_t sum = 0;
        for (const fp8pack::Tensor& tensor : file.tensors()) {
            if (tensor.nbytes() > 0) sum = sum + tensor.data[0] + tensor.data[tensor.nbytes() - 1];
        }
    } catch (const fp8pack::Error&) {
    }
    return 0;
}
