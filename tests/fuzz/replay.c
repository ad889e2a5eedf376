/* For compilers without libFuzzer: every file of the corpus, then changed ones for a while.
 * Usage: replay SECONDS SEED FOLDER...; prints one line and ends with 0, or leaves the input in ./crash-input. */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

enum { INPUT_BYTES_MAX = 512, INPUTS_MAX = 4096, INPUT_S_MAX = 10 };

static struct input {
    size_t size;
    uint8_t data[INPUT_BYTES_MAX];
} inputs[INPUTS_MAX], now;
static unsigned input_count;
static uint64_t state;

static void keep(void)
{
    int fd = open("crash-input", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd >= 0) {
        (void)!write(fd, now.data, now.size);
        close(fd);
    }
}

static void on_signal(int number)
{
    static const char hang[] = "replay: an input took too long, or ended in a signal; it is in ./crash-input\n";
    keep();
    (void)!write(STDERR_FILENO, hang, sizeof hang - 1);
    signal(number, SIG_DFL);
    raise(number);
}

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static void read_folder(const char *path)
{
    struct dirent **names;
    int count = scandir(path, &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char file[4096];
        snprintf(file, sizeof file, "%s/%s", path, names[i]->d_name);
        int fd = names[i]->d_name[0] != '.' && input_count < INPUTS_MAX ? open(file, O_RDONLY) : -1;
        ssize_t size = fd >= 0 ? read(fd, inputs[input_count].data, INPUT_BYTES_MAX) : -1;
        if (size >= 0) {
            inputs[input_count++].size = (size_t)size;
        }
        if (fd >= 0) {
            close(fd);
        }
        free(names[i]);
    }
    if (count >= 0) {
        free(names);
    }
}

static void change(void)
{
    static const uint64_t edges[] = {0, 1, 63, 64, 4096, 1u << 31, UINT32_MAX, UINT64_C(1) << 63, UINT64_MAX};
    for (uint64_t changes = 1 + draw(6); changes != 0; changes--) {
        size_t at = draw(now.size + 1), size = 1 + draw(16);
        const struct input *other = &inputs[draw(input_count)];
        if (draw(4) == 0 && now.size + size <= INPUT_BYTES_MAX) { /* bytes of another one go in between */
            size_t from = draw(other->size + 1);
            size = size < other->size - from ? size : other->size - from;
            memmove(now.data + at + size, now.data + at, now.size - at);
            memcpy(now.data + at, other->data + from, size);
            now.size += size;
        } else if (draw(4) == 0) {
            size = size < now.size - at ? size : now.size - at;
            memmove(now.data + at, now.data + at + size, now.size - at - size);
            now.size -= size;
        } else if (draw(2) == 0 && at + 8 <= now.size) {
            memcpy(now.data + at, &edges[draw(sizeof edges / sizeof *edges)], 8);
        } else if (at < now.size) {
            now.data[at] = (uint8_t)draw(256);
        }
    }
}

static void run(void)
{
    alarm(INPUT_S_MAX);
    LLVMFuzzerTestOneInput(now.data, now.size);
    alarm(0);
}

int main(int count, char **arguments)
{
    static const int signals[] = {SIGALRM, SIGSEGV, SIGBUS, SIGABRT};
    if (count < 4) {
        fprintf(stderr, "usage: replay SECONDS SEED FOLDER...\n");
        return 2;
    }
    for (int i = 3; i < count; i++) {
        read_folder(arguments[i]);
    }
    if (input_count == 0) {
        fprintf(stderr, "replay: no input in %s\n", arguments[3]);
        return 2;
    }
    for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++) {
        signal(signals[i], on_signal);
    }
    if (__sanitizer_set_death_callback != NULL) {
        __sanitizer_set_death_callback(keep);
    }
    for (unsigned i = 0; i < input_count; i++) {
        now = inputs[i];
        run();
    }
    state = strtoull(arguments[2], NULL, 10) * 2 + 1;
    unsigned long long changed = 0;
    for (time_t end = time(NULL) + atol(arguments[1]); time(NULL) < end; changed++) {
        now = inputs[draw(input_count)];
        change();
        run();
    }
    printf("replay: ok, %u inputs, %llu changed ones, seed %s\n", input_count, changed, arguments[2]);
    return 0;
}
