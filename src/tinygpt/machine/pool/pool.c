/* A fork-join pool for kernels: one caller, some workers, no libc and no linker.
 *
 * Compiled and loaded the way tinygrad compiles and loads a kernel, so it may hold no global
 * variable, call nothing outside this file except through the pointers in `struct pool`, and must
 * begin with the function that is called from outside.
 *
 * A list of commands is run in order. A command is a row of words:
 *
 *     address of the kernel | pieces, slot << 16, arguments << 32 | argument 0 | argument 1 | ...
 *
 * A kernel of several pieces is called once for each piece, with the number of the piece in
 * argument `slot`. The pieces are independent. They lie in a few shares in a row; each thread, the
 * caller or a worker, takes one piece after another of its own share, and then of the others (work
 * stealing). So a core mostly works on the same part of the data from one command to the next, which
 * is in its cache, and no command waits for a slow core while another is idle. All pieces of a
 * command are done before the next one starts.
 */

typedef unsigned long long word;

enum { RUN, SERVE, START, STOP }; /* the four functions behind the one entry */
enum { SHARES = 16 };             /* with more threads than that, several have one share */

/* A counter that one side raises and the other waits for: a "futex" with a mutex and a condition
 * variable, because this file makes no system call. The waiter spins for a while, then sleeps.
 * _Alignas(64): each lies in a cache line of its own, or cores would take turns owning the line. */
struct event {
  _Alignas(64) word value;
  word sleepers;
  _Alignas(64) char condition[128];
};

struct share {
  _Alignas(64) word next; /* end of the share << 32 | its first piece that no thread has taken */
};

struct pool {
  /* Filled in before the first call, in this order, by workers.py. */
  int (*init_mutex)(void *mutex, const void *attributes);
  int (*lock)(void *mutex);
  int (*unlock)(void *mutex);
  int (*init_condition)(void *condition, const void *attributes);
  int (*wait)(void *condition, void *mutex);
  int (*wake_all)(void *condition);
  int (*clock)(int id, word time[2]);
  int (*cpu)(void); /* this and the next two are 0 where the system lacks them */
  int (*get_affinity)(int process, word bytes, word *mask);
  int (*set_affinity)(int thread, word bytes, const word *mask);
  word process; /* its id */
  word clock_id;
  word patience; /* nanoseconds to spin before going to sleep */
  word threads;  /* the caller and the workers; 1 runs everything on the caller */
  _Alignas(64) char mutex[128];
  struct event work; /* grows with every kernel, and when the pool stops */
  struct event done; /* the number of kernels whose last piece a worker finished */
  word stopped;      /* once set it stays set, whatever happens to the events */
  word busy;
  word home; /* the CPU of the caller */
  _Alignas(64) const word *command;
  _Alignas(64) word pending; /* pieces that are not finished */
  struct share shares[SHARES];
};

#define load(at) __atomic_load_n(at, __ATOMIC_SEQ_CST)
#define store(at, value) __atomic_store_n(at, value, __ATOMIC_SEQ_CST)

static void start(struct pool *pool);
static void stop(struct pool *pool);
static void run(struct pool *pool, const word *command, word count);
static void serve(struct pool *pool, word rank);

/* The only entry. START comes first, while no worker serves; then SERVE(rank), once for each worker,
 * returns after STOP; RUN(list, count) is for the caller, who has the rank 0. */
void tinygpt_pool(struct pool *pool, word wish, word x, word y) {
  if (wish == RUN)
    run(pool, (const word *)x, y);
  else if (wish == SERVE)
    serve(pool, x);
  else if (wish == START)
    start(pool);
  else
    stop(pool);
}

/* ---- events ---- */

static word now(struct pool *pool) {
  word time[2];
  pool->clock((int)pool->clock_id, time);
  return time[0] * 1000000000 + time[1];
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

/* Wait until the event's value is no longer `seen`, and return the new one.
 *
 * The clock costs more than a look, so it is read once for 16. relax() tells the core that
 * it is spinning, so that it leaves the execution units to the other thread of the same core. */
static word await_change(struct pool *pool, struct event *event, word seen) {
  word value, start = now(pool);
  do
    for (int i = 0; i < 16; i++) {
      if ((value = load(&event->value)) != seen) return value;
      relax();
    }
  while (now(pool) - start < pool->patience);
  /* advance() changes the value and then reads `sleepers`; a waiter adds itself to `sleepers` and
   * then reads the value. With sequentially consistent atomics at least one of the two sees the
   * other (Dekker's argument), so no change is slept through. */
  pool->lock(pool->mutex);
  __atomic_add_fetch(&event->sleepers, 1, __ATOMIC_SEQ_CST);
  while ((value = load(&event->value)) == seen) pool->wait(event->condition, pool->mutex);
  __atomic_sub_fetch(&event->sleepers, 1, __ATOMIC_SEQ_CST);
  pool->unlock(pool->mutex);
  return value;
}

static void advance(struct pool *pool, struct event *event) {
  __atomic_add_fetch(&event->value, 1, __ATOMIC_SEQ_CST);
  if (!load(&event->sleepers)) return;
  pool->lock(pool->mutex);
  pool->wake_all(event->condition);
  pool->unlock(pool->mutex);
}

/* ---- calls ---- */

#define PIECES(command) ((command)[1] & 0xffff)
#define SLOT(command) ((command)[1] >> 16 & 0xffff)
#define ARGUMENTS(command) ((command)[1] >> 32)

/* A kernel's parameters are pointers and integers, so a call with more words than it takes is
 * harmless in the C calling conventions of x86-64 and arm64: four sizes of call serve all. */
#define A4(i) a[i], a[i + 1], a[i + 2], a[i + 3]
#define A8(i) A4(i), A4(i + 4)
#define A16(i) A8(i), A8(i + 8)
#define W4 word, word, word, word
#define W8 W4, W4
#define W16 W8, W8

static void call(const word *command, word piece) {
  /* A copy, because to choose each word between the list and the piece takes clang a second. */
  word a[64], slot = SLOT(command), n = ARGUMENTS(command);
  for (word i = 0; i < n; i++) a[i] = command[2 + i];
  if (slot < n) a[slot] = piece;
  void *kernel = (void *)command[0];
  if (n <= 8)
    ((void (*)(W8))kernel)(A8(0));
  else if (n <= 16)
    ((void (*)(W16))kernel)(A16(0));
  else if (n <= 32)
    ((void (*)(W16, W16))kernel)(A16(0), A16(16));
  else
    ((void (*)(W16, W16, W16, W16))kernel)(A16(0), A16(16), A16(32), A16(48));
}

/* ---- fork and join ---- */

/* Sixty-four bits hold a share, so that one atomic addition takes a piece: no lock, no retry. */
#define LEFT(next) (((next) & 0xffffffff) < (next) >> 32)

static word shares_of(struct pool *pool) { return pool->threads < SHARES ? pool->threads : SHARES; }

/* Run pieces until none is left. True for the thread that finishes the last one.
 *
 * Invariant: `command` and `pending` belong to the kernel whose pieces a share counts, and stay as
 * they are while one of its pieces is not finished. So a thread that took a piece may read them, and
 * one that comes too late finds no piece, or helps with the kernel after. */
static int work(struct pool *pool, word rank) {
  word count = shares_of(pool), first = rank * count / pool->threads;
  int last = 0;
  for (word i = 0; i < count; i++) {
    word *share = &pool->shares[(first + i) % count].next, next;
    while (next = load(share), LEFT(next)) {
      next = __atomic_fetch_add(share, 1, __ATOMIC_SEQ_CST);
      if (!LEFT(next)) break;
      call(pool->command, next & 0xffffffff);
      last = !__atomic_sub_fetch(&pool->pending, 1, __ATOMIC_SEQ_CST);
    }
  }
  return last;
}

/* A worker that wakes up on the caller's CPU moves to the others that the process may use. Left
 * alone, Linux keeps the two there: each sleeps or spins while the other works, so the load looks
 * like that of one thread, and a kernel takes `patience` longer while another CPU is idle. */
static void leave_home(struct pool *pool) {
  word mask[16] = {0}, home = load(&pool->home);
  if (!pool->cpu || (word)pool->cpu() != home || home >= 8 * sizeof mask) return;
  if (pool->get_affinity((int)pool->process, sizeof mask, mask) < 0) return;
  mask[home / 64] &= ~(1ull << home % 64);
  pool->set_affinity(0, sizeof mask, mask); /* refused, with no harm, if no CPU is left */
}

static void serve(struct pool *pool, word rank) {
  /* `stopped` is read after every change of the event, and is set before the last one. */
  for (word seen = 0; seen = await_change(pool, &pool->work, seen), !load(&pool->stopped);) {
    leave_home(pool);
    if (work(pool, rank)) advance(pool, &pool->done);
  }
}

static void fork_join(struct pool *pool, const word *command) {
  word before = load(&pool->done.value);
  pool->command = command;
  if (pool->cpu) store(&pool->home, (word)pool->cpu());
  store(&pool->pending, PIECES(command));
  word count = shares_of(pool), pieces = PIECES(command);
  for (word i = 0; i < count; i++)
    store(&pool->shares[i].next, (i + 1) * pieces / count << 32 | i * pieces / count);
  advance(pool, &pool->work);
  if (!work(pool, 0)) await_change(pool, &pool->done, before);
}

static void start(struct pool *pool) {
  pool->init_mutex(pool->mutex, 0);
  pool->init_condition(pool->work.condition, 0);
  pool->init_condition(pool->done.condition, 0);
}

static void stop(struct pool *pool) {
  store(&pool->stopped, 1);
  advance(pool, &pool->work);
}

static void run(struct pool *pool, const word *command, word count) {
  /* While one thread has the workers, a second caller does its work alone. */
  int alone = pool->threads < 2 || __atomic_exchange_n(&pool->busy, 1, __ATOMIC_SEQ_CST);
  for (; count; count--, command += 2 + ARGUMENTS(command)) {
    if (!alone && PIECES(command) > 1)
      fork_join(pool, command);
    else
      for (word piece = 0; piece < PIECES(command); piece++) call(command, piece);
  }
  if (!alone) store(&pool->busy, 0);
}
