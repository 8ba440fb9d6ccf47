/* MPI_Alltoallv with the counts of `mesh-bench exchange`: alltoallv ATTENTION EXPERTS BLOCK_MS GATHER, under mpirun with that many
 * ranks.
 *
 * Each attention rank sends its rows split evenly over the expert ranks (dispatch), an expert rank copies what came, and sends it back
 * (combine): two collectives are one round trip. With GATHER 1 an attention rank first copies its rows to where it sends them from, as
 * the mesh's does; with 0 it sends one buffer over and over. All counts are known beforehand, which favours MPI: nobody has to be told them.
 * Rank 0, an attention rank, prints one JSON object a line: rows, samples, p50_us, p99_us of its own round trips. */

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    ROW_BYTES = 2048 * 2, /* hidden 2048 in bf16 */
    ROWS_MAX = 128,
    RANKS_MAX = 64,
    BATCH = 10, /* round trips between two looks at whether to go on */
    SAMPLES_MAX = 500000,
    LIFE_S_MAX = 110, /* a rank whose peers are gone ends by itself */
};

static const int ROWS[] = {0, 1, 8, 64, 128};

/* One rank's side of a round trip. */
struct side {
    int attention, experts, rank, gather;
    unsigned char *sent, *came, *activations;
    /* Dispatch sends by `out` and receives by `in`; combine the other way round. */
    int out[RANKS_MAX], out_at[RANKS_MAX], in[RANKS_MAX], in_at[RANKS_MAX];
};

static int share(int rows, int expert, int experts) {
    return rows / experts + (expert < rows % experts);
}

static void count(struct side *s, int rows) {
    int out = 0, in = 0;
    for (int peer = 0; peer < s->attention + s->experts; peer++) {
        int from_attention = s->rank < s->attention, to_attention = peer < s->attention;
        s->out[peer] = from_attention && !to_attention ? share(rows, peer - s->attention, s->experts) * ROW_BYTES : 0;
        s->in[peer] = !from_attention && to_attention ? share(rows, s->rank - s->attention, s->experts) * ROW_BYTES : 0;
        s->out_at[peer] = out;
        s->in_at[peer] = in;
        out += s->out[peer];
        in += s->in[peer];
    }
}

static void round_trip(struct side *s) {
    int ranks = s->attention + s->experts;
    if (s->gather) {
        memcpy(s->sent, s->activations, (size_t)(s->out_at[ranks - 1] + s->out[ranks - 1]));
    }
    MPI_Alltoallv(s->sent, s->out, s->out_at, MPI_BYTE, s->came, s->in, s->in_at, MPI_BYTE, MPI_COMM_WORLD);
    if (s->rank >= s->attention) {
        memcpy(s->sent, s->came, (size_t)(s->in_at[ranks - 1] + s->in[ranks - 1]));
    }
    MPI_Alltoallv(s->sent, s->in, s->in_at, MPI_BYTE, s->came, s->out, s->out_at, MPI_BYTE, MPI_COMM_WORLD);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Round trips of `rows` rows for about `block_s`; rank 0 says whether to go on. */
static void measure(struct side *s, int rows, double block_s, double *us) {
    count(s, rows);
    if (s->rank < s->attention) {
        for (int at = 0; at < rows * ROW_BYTES; at++) {
            s->sent[at] = s->activations[at] = (unsigned char)(at * 31 + s->rank + rows);
        }
    }
    memset(s->came, 0, (size_t)ROWS_MAX * ROW_BYTES);
    round_trip(s);
    if (s->rank < s->attention && memcmp(s->sent, s->came, (size_t)rows * ROW_BYTES) != 0) {
        fprintf(stderr, "alltoallv: rank %d got back other bytes than it sent, %d rows\n", s->rank, rows);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    for (int i = 0; i < BATCH; i++) {
        round_trip(s);
    }
    int samples = 0, more = 1;
    double until = MPI_Wtime() + block_s;
    while (more) {
        double begun = MPI_Wtime();
        for (int i = 0; i < BATCH; i++) {
            round_trip(s);
            double done = MPI_Wtime();
            us[samples++] = (done - begun) * 1e6;
            begun = done;
        }
        more = begun < until && samples + BATCH <= SAMPLES_MAX;
        MPI_Bcast(&more, 1, MPI_INT, 0, MPI_COMM_WORLD); /* between the samples, in none of them */
    }
    if (s->rank == 0) {
        qsort(us, (size_t)samples, sizeof *us, by_value);
        printf("{\"rows\": %d, \"samples\": %d, \"p50_us\": %.3f, \"p99_us\": %.3f}\n", rows, samples, us[samples / 2],
               us[(int)(samples * 0.99)]);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    alarm(LIFE_S_MAX);
    MPI_Init(&argc, &argv);
    struct side s = {0};
    int ranks = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &s.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc == 5) {
        s.attention = atoi(argv[1]);
        s.experts = atoi(argv[2]);
        s.gather = atoi(argv[4]);
    }
    if (s.attention < 1 || s.experts < 1 || s.attention + s.experts != ranks || ranks > RANKS_MAX) {
        fprintf(stderr, "usage: mpirun -n ATTENTION+EXPERTS alltoallv ATTENTION EXPERTS BLOCK_MS 0|1 (%d ranks at most)\n",
                RANKS_MAX);
        MPI_Abort(MPI_COMM_WORLD, 2);
    }
    /* An expert rank may get every attention rank's rows. */
    size_t bytes = (size_t)ROWS_MAX * ROW_BYTES * (size_t)s.attention;
    s.sent = calloc(1, bytes);
    s.came = calloc(1, bytes);
    s.activations = calloc(1, bytes);
    double *us = calloc(SAMPLES_MAX, sizeof *us);
    if (!s.sent || !s.came || !s.activations || !us) {
        fprintf(stderr, "alltoallv: no memory\n");
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    for (size_t i = 0; i < sizeof ROWS / sizeof *ROWS; i++) {
        measure(&s, ROWS[i], atof(argv[3]) / 1e3, us);
    }
    MPI_Finalize();
    return 0;
}
