// Preloaded into a program: writes how many bytes it has asked for and not given back, once a second.
// Memory that a program holds may grow without a leak: what malloc got from the system lies in pieces between
// what is in use. What is in use is the program's own doing.

#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void *tell(void *name) {
    int file = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    for (;;) {
        struct mallinfo2 found = mallinfo2();  // of all arenas, and of what is mapped for itself
        char line[32];
        int length = snprintf(line, sizeof line, "%24zu\n", found.uordblks + found.hblkhd);
        if (pwrite(file, line, (size_t) length, 0) != length) return NULL;
        sleep(1);
    }
}

__attribute__((constructor)) static void begin(void) {
    pthread_t thread;
    char *name = getenv("MONE_HEAP");
    if (name && pthread_create(&thread, NULL, tell, name) == 0) pthread_detach(thread);
}
