// Copies between the pages of a device and blocks in pinned host memory, by few thread blocks.
//
// A block is cut into parts of PART_BYTES within its pieces, numbered through; thread block b does
// parts b, b + gridDim.x, … of all pairs. Each thread has four loads under way before its first
// store, because a load over the bus takes a microsecond or two. Nothing is shared, so there is
// nothing to synchronise.

#define PART_BYTES 32768
#define LOADS 4

struct alignas(16) vector16 {
    unsigned int words[4];
};

struct piece {
    long long base, stride, bytes, offset;
};

template <typename T>
static __device__ void part_copy(char *target, const char *source, int bytes)
{
    const T *from = reinterpret_cast<const T *>(source);
    T *to = reinterpret_cast<T *>(target);
    int count = bytes / static_cast<int>(sizeof(T)), step = blockDim.x;

    for (int first = threadIdx.x; first < count; first += LOADS * step) {
        T held[LOADS];

#pragma unroll
        for (int load = 0; load < LOADS; load++)
            if (first + load * step < count)
                held[load] = from[first + load * step];
#pragma unroll
        for (int load = 0; load < LOADS; load++)
            if (first + load * step < count)
                to[first + load * step] = held[load];
    }
}

static __device__ bool all_aligned(const char *target, const char *source, int bytes, int size)
{
    unsigned long long address = reinterpret_cast<unsigned long long>(target) |
                                 reinterpret_cast<unsigned long long>(source) |
                                 static_cast<unsigned long long>(bytes);

    return address % size == 0;
}

// pieces[piece_count]: where block 0's pieces are, and where they go in a host block.
// parts[piece_count + 1]: parts before each piece, and before what follows; parts[0] need not be 0,
// so that some of a block's pieces can be copied with a part of the tables of all.
// ids[2 * pairs]: device blocks, then host blocks; in memory that the device can read.
extern "C" __global__ void paged_copy(const piece *pieces, const long long *parts, int piece_count,
                                      const long long *ids, long long pairs, char *host,
                                      long long host_stride, int to_host)
{
    long long before = parts[0], of_block = parts[piece_count] - before;

    for (long long item = blockIdx.x; item < pairs * of_block; item += gridDim.x) {
        long long pair = item / of_block, part = before + item % of_block;
        int low = 0, high = piece_count;

        while (high - low > 1) {
            int middle = low + (high - low) / 2;

            if (parts[middle] <= part)
                low = middle;
            else
                high = middle;
        }
        piece of = pieces[low];
        long long skip = (part - parts[low]) * PART_BYTES;
        int bytes = static_cast<int>(of.bytes - skip < PART_BYTES ? of.bytes - skip : PART_BYTES);
        char *page = reinterpret_cast<char *>(of.base + ids[pair] * of.stride + skip);
        char *block = host + ids[pairs + pair] * host_stride + of.offset + skip;
        char *target = to_host ? block : page;
        const char *source = to_host ? page : block;

        if (all_aligned(target, source, bytes, 16))
            part_copy<vector16>(target, source, bytes);
        else if (all_aligned(target, source, bytes, 4))
            part_copy<unsigned int>(target, source, bytes);
        else
            part_copy<unsigned char>(target, source, bytes);
    }
}
