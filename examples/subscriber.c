/* A complete subscriber in C: gapless verdicts from a flawline station, with libzmq and nothing else.
 *
 *     cc -O2 -Wall -o subscriber subscriber.c -lzmq
 *     ./subscriber tcp://127.0.0.1:5555 tcp://127.0.0.1:5556 [COUNT]
 *
 * Prints one line a verdict: seq, camera, trigger_id, result, reason. What was missed on the way (the numbers show it)
 * is fetched from the control socket; while that does not answer, later verdicts wait, so that none overtakes. A
 * station whose status stays away for three seconds is at fault: everything but `pass` is a reject, and so is silence.
 * Exit code 0 after COUNT verdicts, 1 on an error.
 *
 * It has no CURVE: it reads a station on the same machine that has no keys, or one with `insecure = true`. With keys,
 * set ZMQ_CURVE_SERVERKEY, ZMQ_CURVE_PUBLICKEY and ZMQ_CURVE_SECRETKEY on both sockets before zmq_connect.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

/* -- msgpack: as much as a reader of flawline's headers needs -------------------------------------------------- */

typedef struct { const uint8_t *at, *end; } reader;
typedef enum { NIL, BOOLEAN, INTEGER, FLOATING, TEXT, ARRAY, MAP, BAD } kind;
typedef struct {
    kind kind;
    int64_t integer;      /* INTEGER, BOOLEAN; the number of elements of ARRAY and MAP */
    double floating;      /* FLOATING */
    const char *text;     /* TEXT (also bytes): not terminated */
    size_t length;
} value;

static uint64_t big_endian(reader *r, int bytes) {
    uint64_t number = 0;
    while (bytes--) number = number << 8 | *r->at++;
    return number;
}

static int has(const reader *r, uint64_t bytes) { return (uint64_t)(r->end - r->at) >= bytes; }

static value bad(reader *r) { r->at = r->end; return (value){.kind = BAD}; }

static value take_text(reader *r, uint64_t length) {
    if (!has(r, length)) return bad(r);
    value v = {.kind = TEXT, .text = (const char *)r->at, .length = length};
    r->at += length;
    return v;
}

/* The next value; of an array or a map only its head: its elements follow. */
static value next(reader *r) {
    if (!has(r, 1)) return bad(r);
    uint8_t tag = *r->at++;
    if (tag <= 0x7f) return (value){.kind = INTEGER, .integer = tag};
    if (tag >= 0xe0) return (value){.kind = INTEGER, .integer = (int8_t)tag};
    if (tag <= 0x8f) return (value){.kind = MAP, .integer = tag & 0x0f};
    if (tag <= 0x9f) return (value){.kind = ARRAY, .integer = tag & 0x0f};
    if (tag <= 0xbf) return take_text(r, tag & 0x1f);
    static const uint8_t sizes[] = {/* c0 */ 0, 0, 0, 0, 1, 2, 4, 0, 0, 0, 4, 8, 1, 2, 4, 8,
                                    /* d0 */ 1, 2, 4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4};
    int size = sizes[tag - 0xc0];
    if (!has(r, size)) return bad(r);
    uint64_t raw = big_endian(r, size);
    switch (tag) {
    case 0xc0: return (value){.kind = NIL};
    case 0xc2: case 0xc3: return (value){.kind = BOOLEAN, .integer = tag & 1};
    case 0xc4: case 0xc5: case 0xc6: case 0xd9: case 0xda: case 0xdb: return take_text(r, raw);
    case 0xca: { uint32_t bits = (uint32_t)raw; float f; memcpy(&f, &bits, 4);
                 return (value){.kind = FLOATING, .floating = f}; }
    case 0xcb: { double d; memcpy(&d, &raw, 8); return (value){.kind = FLOATING, .floating = d}; }
    case 0xcc: case 0xcd: case 0xce: case 0xcf: return (value){.kind = INTEGER, .integer = (int64_t)raw};
    case 0xd0: return (value){.kind = INTEGER, .integer = (int8_t)raw};
    case 0xd1: return (value){.kind = INTEGER, .integer = (int16_t)raw};
    case 0xd2: return (value){.kind = INTEGER, .integer = (int32_t)raw};
    case 0xd3: return (value){.kind = INTEGER, .integer = (int64_t)raw};
    case 0xdc: case 0xdd: return (value){.kind = ARRAY, .integer = (int64_t)raw};
    case 0xde: case 0xdf: return (value){.kind = MAP, .integer = (int64_t)raw};
    default: return bad(r); /* flawline sends no extension types */
    }
}

/* Leave out one whole value, whatever is inside it. */
static void skip(reader *r) {
    uint64_t left = 1;
    while (left-- && r->at < r->end) {
        value v = next(r);
        if (v.kind == ARRAY) left += v.integer;
        if (v.kind == MAP) left += 2 * (uint64_t)v.integer;
    }
}

/* The value of a key of a map, or NIL. `map` stands at the map's head and is not moved. */
static value find(reader map, const char *key, reader *at) {
    value head = next(&map);
    if (head.kind != MAP) return (value){.kind = BAD};
    for (int64_t i = 0; i < head.integer && map.at < map.end; i++) {
        value name = next(&map);
        if (name.kind == TEXT && name.length == strlen(key) && !memcmp(name.text, key, name.length)) {
            if (at) *at = map;
            return next(&map);
        }
        skip(&map);
    }
    return (value){.kind = NIL};
}

static int64_t integer_of(reader map, const char *key) {
    value v = find(map, key, NULL);
    return v.kind == INTEGER ? v.integer : -1;
}

static void print_text(const char *name, value v) {
    if (v.kind == TEXT) printf(" %s=%.*s", name, (int)v.length, v.text);
    else printf(" %s=-", name);
}

/* -- the subscriber ----------------------------------------------------------------------------------------- */

static int64_t last_seq = -1; /* of the last verdict that was printed */
static char boot[64];         /* the start of the station that it is of */
static long left = -1;        /* verdicts still to print; -1: without end */
static double ask_after = 0;  /* not before then: a control socket that did not answer is left alone for a second */
static const int64_t largest = 64 << 20; /* bytes of one message; who sends a larger one is disconnected */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void print_verdict(reader header, int replayed) {
    last_seq = integer_of(header, "seq");
    printf("seq=%lld", (long long)last_seq);
    for (const char **key = (const char *[]){"camera", "trigger_id", "result", "reason", NULL}; *key; key++)
        print_text(*key, find(header, *key, NULL));
    printf("%s\n", replayed ? " (replayed)" : "");
    fflush(stdout);
    if (left > 0) left--;
}

/* Ask the control socket for the verdicts after `last_seq` up to `newest`, and print them. 0 where nobody answers. */
static int heal(void *context, const char *control, int64_t newest) {
    if (now() < ask_after) return 0; /* meanwhile the publisher is read: it may have fallen silent */
    while (last_seq < newest && left != 0) {
        uint8_t request[64], *at = request;
        static const uint8_t head[] = "\x84\xa3" "cmd\xa6replay\xa2id\x01\xa8" "from_seq\xcf";
        memcpy(at, head, sizeof head - 1), at += sizeof head - 1;
        for (int shift = 56; shift >= 0; shift -= 8) *at++ = (uint8_t)((uint64_t)(last_seq + 1) >> shift);
        memcpy(at, "\xa6to_seq\xcf", 8), at += 8;
        for (int shift = 56; shift >= 0; shift -= 8) *at++ = (uint8_t)((uint64_t)newest >> shift);

        void *socket = zmq_socket(context, ZMQ_REQ);
        int limit_ms = 2000, linger = 0;
        zmq_setsockopt(socket, ZMQ_RCVTIMEO, &limit_ms, sizeof limit_ms);
        zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger);
        zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest, sizeof largest);
        zmq_msg_t reply;
        zmq_msg_init(&reply);
        int ok = zmq_connect(socket, control) == 0 && zmq_send(socket, request, at - request, 0) >= 0 &&
                 zmq_msg_recv(&reply, socket, 0) >= 0;
        if (ok) {
            reader r = {zmq_msg_data(&reply), (uint8_t *)zmq_msg_data(&reply) + zmq_msg_size(&reply)}, list;
            value verdicts = find(r, "verdicts", &list);
            value done = find(r, "done", NULL);
            ok = verdicts.kind == ARRAY;
            if (ok) next(&list);
            for (int64_t i = 0; ok && i < verdicts.integer && left != 0; i++) {
                reader header = list;
                int64_t seq = integer_of(header, "seq");
                if (seq > last_seq + 1)
                    fprintf(stderr, "lost for good: %lld to %lld\n", (long long)last_seq + 1, (long long)seq - 1);
                print_verdict(header, 1);
                skip(&list);
            }
            if (ok && done.kind == BOOLEAN && done.integer && last_seq < newest && left != 0) {
                fprintf(stderr, "lost for good: %lld to %lld\n", (long long)last_seq + 1, (long long)newest);
                last_seq = newest;
            }
        }
        zmq_msg_close(&reply);
        zmq_close(socket);
        if (!ok) {
            if (ask_after == 0)
                fprintf(stderr, "verdicts after %lld are missing: reject everything\n", (long long)last_seq);
            ask_after = now() + 1.0;
            return 0;
        }
    }
    ask_after = 0;
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s PUBLISH CONTROL [COUNT]\n", argv[0]);
        return 1;
    }
    if (argc > 3) left = atol(argv[3]);
    void *context = zmq_ctx_new();
    void *socket = zmq_socket(context, ZMQ_SUB);
    zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest, sizeof largest);
    zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "verdict/", 8);
    zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "status/", 7);
    if (zmq_connect(socket, argv[1])) {
        fprintf(stderr, "%s: %s\n", argv[1], zmq_strerror(zmq_errno()));
        return 1;
    }
    double heard = now();
    int silent = 0;
    while (left != 0) {
        zmq_pollitem_t item = {socket, 0, ZMQ_POLLIN, 0};
        zmq_poll(&item, 1, 500);
        if (now() - heard > 3.0 && !silent) {
            fprintf(stderr, "the station is silent: reject everything\n");
            silent = 1;
        }
        if (!(item.revents & ZMQ_POLLIN)) continue;

        zmq_msg_t topic, data; /* two parts: masks, which have a third, are not subscribed to */
        zmq_msg_init(&topic);
        zmq_msg_init(&data);
        zmq_msg_recv(&topic, socket, 0);
        zmq_msg_recv(&data, socket, 0);
        reader header = {zmq_msg_data(&data), (uint8_t *)zmq_msg_data(&data) + zmq_msg_size(&data)};
        if (zmq_msg_size(&topic) >= 7 && !memcmp(zmq_msg_data(&topic), "status/", 7)) {
            heard = now();
            silent = 0;
            int64_t out = integer_of(header, "last_seq");
            value id = find(header, "boot_id", NULL);
            char started[sizeof boot] = "";
            if (id.kind == TEXT && id.length < sizeof started) memcpy(started, id.text, id.length);
            if (last_seq > out && strcmp(boot, started)) { /* its journal and marks are gone: it counts from 1 again */
                fprintf(stderr, "the station counts anew: had %lld, now %lld\n", (long long)last_seq, (long long)out);
                last_seq = 0;
            }
            memcpy(boot, started, sizeof boot);
            if (last_seq < 0) { /* from here on nothing is missed */
                last_seq = out;
                fprintf(stderr, "gapless from seq=%lld on\n", (long long)out + 1);
            } else if (out > last_seq) heal(context, argv[2], out);
        } else {
            int64_t seq = integer_of(header, "seq");
            if (last_seq >= 0 && seq > last_seq + 1) heal(context, argv[2], seq - 1);
            if (last_seq < 0 || seq == last_seq + 1) print_verdict(header, 0);
        }
        zmq_msg_close(&topic);
        zmq_msg_close(&data);
    }
    zmq_close(socket);
    zmq_ctx_term(context);
    return 0;
}
