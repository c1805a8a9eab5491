// Memory for packed operands: not zeroed, aligned, on large pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#    include <sys/mman.h>
#endif

namespace spt {

class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // What was held before is lost.
    void allocate(int64_t n_floats) {
        std::free(data_);
        const size_t n_bytes = static_cast<size_t>(n_floats) * sizeof(float);
        // a packed operand is read all over its length: with 4 KiB pages the processor would have
        // to look up an address translation for nearly every column
        const size_t alignment = n_bytes >= kLargePage ? kLargePage : 64;
        const size_t rounded = (n_bytes + alignment - 1) / alignment * alignment;
        data_ = static_cast<float*>(std::aligned_alloc(alignment, rounded));
        if (data_ == nullptr && rounded > 0) throw std::bad_alloc();
#if defined(__linux__)
        if (alignment == kLargePage) madvise(data_, rounded, MADV_HUGEPAGE);
#endif
    }

    float* data() { return data_; }

  private:
    static constexpr size_t kLargePage = 2 << 20;
    float* data_ = nullptr;
};

}  // namespace spt
