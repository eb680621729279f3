/* Runs one recorded call of a kernel: reads memory regions and the words of a frame, calls kernel(), writes the regions.
 *
 * Input, int64 unless told otherwise: regions, their sizes; words, each as (region or -1, offset or value); then the bytes of the regions.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void kernel(int64_t frame);

static int64_t number(void) {
    int64_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1) exit(3);
    return value;
}

int main(void) {
    int64_t regions = number(), *sizes = calloc(regions, sizeof *sizes), words_of[40] = {0}, *frame = words_of + 4;
    char **memory = calloc(regions, sizeof *memory);
    for (int64_t i = 0; i < regions; i++) {
        sizes[i] = number();
        memory[i] = aligned_alloc(64, (sizes[i] + 64) / 64 * 64);
    }
    int64_t words = number();
    for (int64_t i = 0; i < words; i++) {
        int64_t region = number(), value = number();
        frame[i] = region < 0 ? value : (int64_t)(memory[region] + value);
    }
    for (int64_t i = 0; i < regions; i++)
        if (fread(memory[i], 1, sizes[i], stdin) != (size_t)sizes[i]) exit(4);
    kernel((int64_t)frame);
    for (int64_t i = 0; i < regions; i++)
        if (fwrite(memory[i], 1, sizes[i], stdout) != (size_t)sizes[i]) exit(5);
    return 0;
}
