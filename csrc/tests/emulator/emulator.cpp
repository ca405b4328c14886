#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "../check.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace polylora::emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;

// ---- fibers: switch_stack(&from, to) saves the callee-saved registers on the stack that is left
#if defined(__x86_64__)
extern "C" void polylora_switch_stack(void** from, void* to);
asm(R"(
.text
.globl polylora_switch_stack
.type polylora_switch_stack, @function
polylora_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size polylora_switch_stack, .-polylora_switch_stack
)");
#endif

struct Machine {
  Options options;
  testing::Random random{1};
  Thread* current = nullptr;
  Cluster* cluster = nullptr;
  const std::function<void()>* kernel = nullptr;
  bool previous_ended = false;
  bool previous_lingers = false;  // until nothing else can run
  uint32_t previous_end = 0;      // what griddepcontrol.wait waits for
  std::vector<GridOrder> grids;
  std::vector<Thread*> ready;
  std::unordered_map<const uint32_t*, std::vector<Thread*>> waiting;
  std::vector<void*> stacks;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
  std::unordered_map<Thread*, std::unique_ptr<ucontext_t>> contexts;
#endif
};
Machine machine;

void yield() {
#if defined(__x86_64__)
  polylora_switch_stack(&machine.current->stack_pointer, machine.scheduler);
#else
  swapcontext(machine.contexts[machine.current].get(), &machine.scheduler);
#endif
}

void release_if_complete(Block& block) {
  if (block.arrived == 0 || block.arrived < block.alive) return;
  block.arrived = 0;
  block.or_result = block.or_value;
  block.or_value = 0;
  advance(block.generation);
}

void release_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  advance(cluster.generation);
}

void fiber_main() {
  (*machine.kernel)();
  Thread& me = *machine.current;
  me.done = true;
  if (!me.has_waited) machine.grids.back().ends_before_wait = true;
  --me.block->alive;
  --me.block->cluster->alive;
  release_if_complete(*me.block);
  release_if_complete(*me.block->cluster);
  yield();
  std::abort();
}

void prepare(Thread& thread, void* stack) {
#if defined(__x86_64__)
  // the stack as polylora_switch_stack leaves it: six registers, then the address to return to, 8 bytes off 16
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  thread.stack_pointer = top;
#else
  auto context = std::make_unique<ucontext_t>();
  getcontext(context.get());
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context.get(), fiber_main, 0);
  machine.contexts[&thread] = std::move(context);
#endif
}

void resume(Thread& thread) {
  machine.current = &thread;
#if defined(__x86_64__)
  polylora_switch_stack(&machine.scheduler, thread.stack_pointer);
#else
  swapcontext(&machine.scheduler, machine.contexts[&thread].get());
#endif
  machine.current = nullptr;
}

void end_previous_grid() {
  if (machine.previous_ended) return;
  machine.previous_ended = true;
  if (machine.options.previous_grid) machine.options.previous_grid();
  advance(machine.previous_end);
}

void run_copy(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  copy.run();
}

void* stack(size_t i) {
  while (machine.stacks.size() <= i) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    machine.stacks.push_back(p);
  }
  return machine.stacks[i];
}

void run_cluster(const Launch& launch, unsigned index) {
  Cluster cluster;
  machine.cluster = &cluster;
  cluster.blocks.resize(static_cast<size_t>(launch.cluster));
  std::vector<std::unique_ptr<GuardedBytes>> smem;
  for (int b = 0; b < launch.cluster; ++b) {
    Block& block = cluster.blocks[static_cast<size_t>(b)];
    block.cluster = &cluster;
    block.rank = b;
    smem.push_back(std::make_unique<GuardedBytes>(launch.smem_bytes));
    block.smem = smem.back()->data();
    block.smem_bytes = launch.smem_bytes;
    block.alive = launch.threads;
    block.warps.resize(static_cast<size_t>((launch.threads + 31) / 32));
    const unsigned flat = index * static_cast<unsigned>(launch.cluster) + static_cast<unsigned>(b);
    for (int t = 0; t < launch.threads; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->thread = {static_cast<unsigned>(t), 0, 0};
      thread->block_index = {flat % launch.grid.x, flat / launch.grid.x % launch.grid.y,
                             flat / launch.grid.x / launch.grid.y};
      thread->grid = {launch.grid.x, launch.grid.y, launch.grid.z};
      thread->block_threads = {static_cast<unsigned>(launch.threads), 1, 1};
      thread->lane = t % 32;
      thread->block = &block;
      thread->warp = &block.warps[static_cast<size_t>(t / 32)];
      prepare(*thread, stack(cluster.threads.size()));
      cluster.threads.push_back(std::move(thread));
    }
  }
  cluster.alive = launch.threads * launch.cluster;

  machine.waiting.clear();
  for (auto& thread : cluster.threads) machine.ready.push_back(thread.get());
  const auto draw = [](auto& from) {
    auto& drawn = from[static_cast<size_t>(machine.random.bits() % from.size())];
    std::swap(drawn, from.back());
    auto item = from.back();
    from.pop_back();
    return item;
  };
  // warps run at unequal speed: for a while, those of higher priority are preferred, so much that a block's others come
  // to stand behind them, which a missing barrier shows by
  constexpr size_t kMostWarps = 32;
  constexpr int kPreference = 60;
  std::vector<uint64_t> priority(cluster.blocks.size() * kMostWarps, 0);
  const auto of = [&](const Thread* t) {
    return priority[static_cast<size_t>(t->block->rank) * kMostWarps + t->thread.x / 32];
  };
  for (int64_t step = 0; cluster.alive > 0; ++step) {
    if (step % 4096 == 0) {
      for (uint64_t& p : priority) p = machine.random.bits();
    }
    // when everybody waits, a copy must be what they wait for
    if (!cluster.in_flight.empty() && (machine.ready.empty() || machine.random.chance(0.02))) {
      run_copy(*draw(cluster.in_flight));
    } else if (!machine.ready.empty()) {
      Thread* thread = draw(machine.ready);
      for (int more = 0; more < kPreference && !machine.ready.empty(); ++more) {
        Thread*& other = machine.ready[static_cast<size_t>(machine.random.bits() % machine.ready.size())];
        if (of(other) > of(thread)) std::swap(thread, other);
      }
      resume(*thread);
    } else if (!machine.waiting[&machine.previous_end].empty()) {
      end_previous_grid();
    } else {
      std::printf("emulator: deadlock in cluster %u: %d threads wait for what never comes\n", index, cluster.alive);
      for (auto& thread : cluster.threads) {
        if (thread->done) continue;
        std::printf("  the first of them: block %d, thread %u; at its block's barrier: %d of %d\n", thread->block->rank,
                    thread->thread.x, thread->block->arrived, thread->block->alive);
        for (auto& [name, barrier] : cluster.barriers) {
          std::printf("  mbarrier %p: phase %u, %lld arrivals and %lld bytes to come\n", name, barrier.phase,
                      static_cast<long long>(barrier.pending), static_cast<long long>(barrier.bytes));
        }
        break;
      }
      std::exit(1);
    }
  }
  for (auto& copy : cluster.in_flight) {
    if (copy->done) continue;
    std::printf("emulator: cluster %u ended with copies under way\n", index);
    std::exit(1);
  }
  machine.cluster = nullptr;
#if !defined(__x86_64__)
  machine.contexts.clear();
#endif
}

}  // namespace

Options& options() { return machine.options; }

std::vector<GridOrder>& grids() { return machine.grids; }

// not inlined: the thread that runs after a switch is another one
__attribute__((noinline)) Thread& self() { return *machine.current; }

void run(const Launch& launch, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  machine.random = testing::Random(machine.options.seed);
  machine.previous_ended = false;
  machine.grids.push_back({});
  if (machine.options.grid_begins) machine.options.grid_begins();
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (blocks % static_cast<unsigned>(launch.cluster) != 0 ||
      launch.grid.x % static_cast<unsigned>(launch.cluster) != 0) {
    std::printf("emulator: a grid of %u blocks in x is not a multiple of clusters of %d\n", launch.grid.x,
                launch.cluster);
    std::exit(1);
  }
  std::vector<unsigned> order(blocks / static_cast<unsigned>(launch.cluster));
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random.bits() % i]);
  machine.previous_lingers = machine.random.chance(0.5);
  for (unsigned index : order) run_cluster(launch, index);
  end_previous_grid();  // no block waited: the next kernel sees its writes all the same
}

void wait_until_changed(const uint32_t& counter, uint32_t value) {
  while (counter == value) {
    machine.waiting[&counter].push_back(machine.current);
    yield();
  }
}

void advance(uint32_t& counter) {
  ++counter;
  const auto found = machine.waiting.find(&counter);
  if (found == machine.waiting.end()) return;
  machine.ready.insert(machine.ready.end(), found->second.begin(), found->second.end());
  found->second.clear();
}

void previous_grid_ended() {
  Thread& me = *machine.current;
  if (!machine.previous_ended) {
    if (machine.previous_lingers) {
      wait_until_changed(machine.previous_end, machine.previous_end);
    } else {
      end_previous_grid();
    }
  }
  me.has_waited = me.block->has_waited = true;
}

void next_grid_may_start() {
  if (!machine.current->block->has_waited) machine.grids.back().starts_next_before_wait = true;
}

void previous_grid_may_write() {
  if (machine.previous_ended || !machine.options.previous_grid || !machine.random.chance(0.002)) return;
  machine.options.previous_grid();
}

int sync_threads_or(int value) {
  Block& block = *self().block;
  const uint32_t generation = block.generation;
  ++block.arrived;
  block.or_value |= value != 0;
  release_if_complete(block);
  wait_until_changed(block.generation, generation);
  return block.or_result;
}

void sync_threads() { sync_threads_or(0); }

void cluster_arrive() {
  Cluster& cluster = *self().block->cluster;
  self().cluster_generation = cluster.generation;
  ++cluster.arrived;
  release_if_complete(cluster);
}

void cluster_wait() {
  Cluster& cluster = *self().block->cluster;
  wait_until_changed(cluster.generation, self().cluster_generation);
}

Barrier& barrier_at(const void* smem) { return machine.cluster->barriers[smem]; }

void complete(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  advance(barrier.phase);
}

void start_copy(std::function<void()> copy) {
  machine.cluster->in_flight.push_back(std::make_shared<Copy>(Copy{std::move(copy)}));
}

GuardedBytes::GuardedBytes(int64_t bytes, unsigned char fill) : bytes_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t rounded = (static_cast<size_t>(bytes) + 15) / 16 * 16;  // as device allocations, aligned
  mapped_ = (rounded + page - 1) / page * page + page;
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) std::abort();
  char* end = static_cast<char*>(mapping_) + mapped_ - page;
  mprotect(end, page, PROT_NONE);
  data_ = reinterpret_cast<unsigned char*>(end - rounded);
  std::memset(data_, fill, rounded);
}

GuardedBytes::~GuardedBytes() { munmap(mapping_, mapped_); }

}  // namespace polylora::emulator

// The dispatchers are host code that launches for CUDA: they are not part of the emulation, their switches are.
namespace polylora::cuda {
__attribute__((weak)) bool batch_invariant() { return false; }  // for tests without linear.cu
}  // namespace polylora::cuda
