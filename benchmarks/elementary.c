/* Compares float32 results with the float64 functions of the C library: benchmarks/elementary.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ULPS 4 /* of float64: more than the error of the C library */

static float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Whether the exact value, within ULPS of a > 0, may be on another side of a middle of two float32
   than a. */
static int undecided(double a) {
    if (a > 0x1.ffffffp127 * 1.001) return 0;
    uint32_t bits = bits_of(a > 0x1.fffffep127 ? 0x1.fffffep127f : (float)a);
    double r = of_bits(bits), slack = ULPS * 0x1p-52 * a;
    double up = bits == 0x7f7fffff ? 0x1p128 : of_bits(bits + 1), down = bits ? of_bits(bits - 1) : r;
    return fabs(a - (r + up) / 2) <= slack || fabs(a - (r + down) / 2) <= slack;
}

/* Checks y[i] against f(x[i]). Writes the places of undecided arguments to `places`, which has room
   for them, and adds the number of wrong results among the others to `wrong`. Returns the number of
   undecided arguments. */
static long compare(double (*f)(double), const float *x, const float *y, long n, long *places,
                    long *wrong) {
    long found = 0;
    for (long i = 0; i < n; i++) {
        double t = f(x[i]);
        if (t == t && t != 0 && undecided(fabs(t)))
            places[found++] = i;
        else
            *wrong += bits_of(t != t ? NAN : (float)t) != bits_of(y[i]);
    }
    return found;
}

static double near_sin(double x) { return fabs(x) <= 0x1p20 ? sin(x) : NAN; }
static double near_cos(double x) { return fabs(x) <= 0x1p20 ? cos(x) : NAN; }

#define EXPORT(name, f)                                                                         \
    long compare_##name(const float *x, const float *y, long n, long *places, long *wrong) {    \
        return compare(f, x, y, n, places, wrong);                                              \
    }

EXPORT(exp, exp)
EXPORT(expm1, expm1)
EXPORT(log, log)
EXPORT(log1p, log1p)
EXPORT(tanh, tanh)
EXPORT(sin, near_sin)
EXPORT(cos, near_cos)
