// Copies between the pages of a device and blocks in pinned host memory, by few thread blocks.
//
// The pieces of a block are cut into parts of at most PART_BYTES, which are numbered through.
// Thread block b copies parts b, b + gridDim.x, … of all pairs. The rate of such a copy is limited
// by how many bytes are under way, because a load over the bus takes a microsecond or two. So there
// are two kernels:
//
//   paged_copy       Each thread has four loads under way before its first store. Threads share
//                    nothing, so there is nothing to synchronise.
//   paged_copy_bulk  For devices that have bulk copies. One thread keeps the shared memory of a
//                    multiprocessor full of parts under way, which takes a quarter of the thread
//                    blocks. Addresses and sizes must be multiples of 16.

#define PART_BYTES 32768
#define LOADS 4
#define LANES 32
#define STAGES_MAX 64

struct alignas(16) vector16 {
    unsigned int words[4];
};

struct piece {
    long long base, stride, bytes, offset;
};

struct copy {
    char *target;
    const char *source;
    int bytes;
};

// pieces[count]: where the pieces of device block 0 are, and where they go in a host block.
// parts[count + 1]: the number of parts before each piece, and after the last. parts[0] need not be
// 0, so that a launch can copy some of a block's pieces with a section of the tables of all.
// ids[2 * pairs]: device blocks, then host blocks; in memory that the device can read.
struct job {
    const piece *pieces;
    const long long *parts;
    int count;
    const long long *ids;
    long long pairs;
    char *host;
    long long host_stride;
    int to_host;
};

static __device__ long long of_block(const job &all)
{
    return all.parts[all.count] - all.parts[0];
}

static __device__ copy copy_of(const job &all, long long item)
{
    long long parts = of_block(all), pair = item / parts, part = all.parts[0] + item % parts;
    int low = 0, high = all.count;

    while (high - low > 1) {
        int middle = low + (high - low) / 2;

        if (all.parts[middle] <= part)
            low = middle;
        else
            high = middle;
    }
    piece of = all.pieces[low];
    long long skip = (part - all.parts[low]) * PART_BYTES;
    int bytes = static_cast<int>(of.bytes - skip < PART_BYTES ? of.bytes - skip : PART_BYTES);
    char *page = reinterpret_cast<char *>(of.base + all.ids[pair] * of.stride + skip);
    char *block = all.host + all.ids[all.pairs + pair] * all.host_stride + of.offset + skip;

    return all.to_host ? copy{block, page, bytes} : copy{page, block, bytes};
}

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

extern "C" __global__ void paged_copy(const piece *pieces, const long long *parts, int count,
                                      const long long *ids, long long pairs, char *host,
                                      long long host_stride, int to_host)
{
    job all{pieces, parts, count, ids, pairs, host, host_stride, to_host};
    long long items = pairs * of_block(all);

    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        copy now = copy_of(all, item);

        if (all_aligned(now.target, now.source, now.bytes, 16))
            part_copy<vector16>(now.target, now.source, now.bytes);
        else if (all_aligned(now.target, now.source, now.bytes, 4))
            part_copy<unsigned int>(now.target, now.source, now.bytes);
        else
            part_copy<unsigned char>(now.target, now.source, now.bytes);
    }
}

#if __CUDA_ARCH__ >= 900

// Stages are slots of shared memory, used in turn. The barrier of a stage opens when the load into
// it has ended; then the store from it begins. That store must have read the stage before the next
// load into it begins.
//
//     load n ──▶ stage n % stages ──barrier──▶ store n, while loads n+1 … n+lag are under way

static __device__ unsigned int shared_address(const void *pointer)
{
    return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

static __device__ void barrier_init(unsigned long long *barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier))
                 : "memory");
}

static __device__ void barrier_wait(unsigned long long *barrier, unsigned int parity)
{
    unsigned int is_done = 0;

    while (!is_done)
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(is_done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

static __device__ void load_begin(void *stage, const char *source, int bytes,
                                  unsigned long long *barrier)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(stage)),
                 "l"(source), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

static __device__ void store_begin(char *target, const void *stage, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(stage)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// stage_bytes: the size of a stage; a multiple of 128, and at least as large as any part.
// stages: how many stages the shared memory of the launch holds, from 3 to STAGES_MAX.
extern "C" __global__ void __launch_bounds__(LANES)
    paged_copy_bulk(const piece *pieces, const long long *parts, int count, const long long *ids,
                    long long pairs, char *host, long long host_stride, int to_host,
                    int stage_bytes, int stages)
{
    extern __shared__ __align__(128) char memory[];
    __shared__ unsigned long long barriers[STAGES_MAX];
    __shared__ char *targets[STAGES_MAX];
    __shared__ int sizes[STAGES_MAX];
    job all{pieces, parts, count, ids, pairs, host, host_stride, to_host};
    long long items = pairs * of_block(all), begin = blockIdx.x, step = gridDim.x;
    long long mine = items > begin ? (items - begin + step - 1) / step : 0;
    int lane = threadIdx.x, lag = stages - 2;

    if (lane == 0) {
        for (int stage = 0; stage < stages; stage++)
            barrier_init(&barriers[stage]);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    for (long long first = 0; first < mine + lag; first += LANES) {
        // Each thread looks up one part; thread 0 begins all loads and stores.
        copy ahead{nullptr, nullptr, 0};

        if (first + lane < mine)
            ahead = copy_of(all, begin + (first + lane) * step);
        for (int turn = 0; turn < LANES && first + turn < mine + lag; turn++) {
            unsigned long long source = __shfl_sync(
                ~0u, reinterpret_cast<unsigned long long>(ahead.source), turn);
            unsigned long long target = __shfl_sync(
                ~0u, reinterpret_cast<unsigned long long>(ahead.target), turn);
            int bytes = __shfl_sync(~0u, ahead.bytes, turn);
            long long number = first + turn, late = number - lag;

            if (lane != 0)
                continue;
            if (number < mine) {
                int stage = static_cast<int>(number % stages);

                // Only the last store begun, which is from another stage, may still be reading.
                asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                targets[stage] = reinterpret_cast<char *>(target);
                sizes[stage] = bytes;
                load_begin(memory + stage * stage_bytes, reinterpret_cast<const char *>(source),
                           bytes, &barriers[stage]);
            }
            if (late >= 0) {
                int stage = static_cast<int>(late % stages);

                barrier_wait(&barriers[stage], static_cast<unsigned int>(late / stages) & 1);
                store_begin(targets[stage], memory + stage * stage_bytes, sizes[stage]);
            }
        }
    }
    if (lane == 0)
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif
