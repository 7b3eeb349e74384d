/* The functions and sums of docs/portable.md, written from that page alone.
   gcc -O2 -std=c11 -ffp-contract=off -shared -fPIC portable.c -o portable.so -lm */

#include <math.h>
#include <stdlib.h>

static const double LN2 = 0.6931471805599453, LOG2E = 1.4426950408889634;
static const double SQRT2 = 1.4142135623730951;
static const double L1 = 0.6931471803691238, L2 = 1.9082149292705877e-10;
static const double P1 = 1.5707963267341256, P2 = 6.077100506303966e-11;
static const double P3 = 2.0222662487959506e-21, TURNS = 0.6366197723675814;

static const double COTH[] = {-1382 / 638512875.0, 2 / 93555.0, -1 / 4725.0, 2 / 945.0,
                              -1 / 45.0, 1 / 3.0};
static const double ATANH[] = {2 / 21.0, 2 / 19.0, 2 / 17.0, 2 / 15.0, 2 / 13.0,
                               2 / 11.0, 2 / 9.0,  2 / 7.0,  2 / 5.0,  2 / 3.0};
static const double SIN[] = {1 / 355687428096000.0, -1 / 1307674368000.0, 1 / 6227020800.0,
                             -1 / 39916800.0, 1 / 362880.0, -1 / 5040.0, 1 / 120.0, -1 / 6.0};
static const double COS[] = {1 / 20922789888000.0, -1 / 87178291200.0, 1 / 479001600.0,
                             -1 / 3628800.0, 1 / 40320.0, -1 / 720.0, 1 / 24.0, -1 / 2.0};
static const float ROUGH[] = {0.9582219f, 0.3956369f, 0.9792026f, 2.885143f};

#define COUNT(c) (int)(sizeof(c) / sizeof *(c))
#define POLY(x, c) poly(x, c, COUNT(c))

static double poly(double x, const double *c, int n) {
    double y = c[0] * x + c[1];
    for (int i = 2; i < n; i++) y = y * x + c[i];
    return y;
}

static double whole(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

static double below(double x) {
    double q = (0x1p52 + 1) * x;
    return fabs(q - (1 - 0x1p-53) * q);
}

static double pow2(double k, int n) {
    double z = k * ldexp(LN2, -n) + ldexp(LN2, -n - 1);
    double y = (0.5 * z + 1) * z + 1;
    for (int i = 0; i < n; i++) y = y * y;
    return below(y);
}

static double log2_of(double s, int j) {
    for (int i = 0; i < j; i++) s = sqrt(s);
    float t = (float)s;
    for (int i = 0; i < 5; i++) t = sqrtf(t);
    float u = (t - 1) / (t + 1), w = u * u, v = ROUGH[0] * w + ROUGH[1];
    for (int i = 2; i < COUNT(ROUGH); i++) v = v * w + ROUGH[i];
    v = u * v;
    return whole((double)v * ldexp(1, j + 5));
}

static double kept(double x, double low, double high) {
    if (x > high) x = high;
    return x < low ? low : x;
}

static double growth(double x, double *k, double *high) {
    *k = whole(x * LOG2E);
    *high = x - *k * L1;
    double low = *k * L2, r = *high - low, h = 0.5 * r, t = h * h;
    double d = h - t * POLY(t, COTH);
    return r * d / (1 - d) - low;
}

static double of_exp(double x, int narrow) {
    double k, high, g = growth(narrow ? kept(x, -104, 89) : kept(x, -746, 710), &k, &high);
    double y = g + high + 1;
    if (narrow) return y * pow2(k, 10);
    double m = whole(0.5 * k - 0.25), c = (k - m) - m + 1, s = pow2(m, 13);
    return y * c * s * s;
}

static double of_expm1(double x, int narrow) {
    double k, high, s, g = growth(kept(x, -50, narrow ? 89 : 710), &k, &high), j = k - 1;
    if (narrow) {
        s = pow2(j, 10);
    } else {
        double m = whole(0.5 * j - 0.25), c = (j - m) - m + 1;
        s = pow2(m, 13) * pow2(m, 13) * c;
    }
    double a = s - 0.5, b = s * high, u = a + b;
    return fabs(x) < 0x1p-54 ? x : 2 * (u + ((b - (u - a)) + s * g));
}

static double of_tanh(double x, int narrow) {
    if (x == 0) return x;
    double y = kept(x, -20, 20), k = whole(y * (2 * LOG2E));
    double h = (y - k * (L1 / 2)) - k * (L2 / 2), s = pow2(k, 8), t = h * h;
    double q = t * POLY(t, COTH), u = s * (q + h), v = q - h;
    return ((s - 1) + (u - v)) / ((s + 1) + (u + v));
}

static double near(double f, double k) {
    double s = f / (2 + f), z = s * s, b = 0.5 * f * f;
    return k * L1 - ((b - (s * (b + z * POLY(z, ATANH)) + k * L2)) - f);
}

static double of_log(double x, int narrow) {
    if (!(x >= 0)) return NAN;
    if (x == 0 || x == INFINITY) return x == 0 ? -INFINITY : x;
    double y = narrow ? x : x > 1 ? x * 0x1p-60 : x * 0x1p60;
    double s = below(SQRT2 * y), f = y / s - 1, k = log2_of(s, narrow ? 1 : 4);
    if (!narrow) k = x > 1 ? k + 60 : k - 60;
    return near(f, k);
}

static double of_log1p(double x, int narrow) {
    if (fabs(x) < 0x1p-54) return x;
    double y = !narrow && x > 0x1p900 ? x * 0x1p-100 : x;
    double w = 1 + y, a = w - 1, b = (1 - (w - a)) + (y - a);
    if (!(w >= 0)) return NAN;
    if (w == 0 || x == INFINITY) return w == 0 ? -INFINITY : x;
    double s = below(SQRT2 * w), k = log2_of(s, narrow ? 1 : 4);
    if (!narrow && x > 0x1p900) k = k + 100;
    return near((w / s - 1) + b / s, k);
}

static double wave(double x, double quarters) {
    if (!(fabs(x) <= 0x1p20)) return NAN;
    double k = whole(x * TURNS), r = ((x - k * P1) - k * P2) - k * P3;
    k = k + quarters;
    double i = k - 4 * whole(0.25 * k - 0.375), o = i - 2 * whole(0.5 * i - 0.25), t = r * r;
    double S = r + r * (t * POLY(t, SIN)), C = 1 + t * POLY(t, COS);
    return (S * (1 - o) + C * o) * (1 - (i - o));
}

static double of_sin(double x, int narrow) { return x == 0 ? x : wave(x, 0); }
static double of_cos(double x, int narrow) { return wave(x, 1); }

static double number(double y) { return y != y ? NAN : y; }

#define EXPORT(name)                                                                             \
    void name##_float32(const float *x, float *y, long n) {                                      \
        for (long i = 0; i < n; i++) y[i] = (float)number(x[i] != x[i] ? NAN : of_##name(x[i], 1)); \
    }                                                                                            \
    void name##_float64(const double *x, double *y, long n) {                                    \
        for (long i = 0; i < n; i++) y[i] = number(x[i] != x[i] ? NAN : of_##name(x[i], 0));      \
    }

EXPORT(exp)
EXPORT(expm1)
EXPORT(log)
EXPORT(log1p)
EXPORT(tanh)
EXPORT(sin)
EXPORT(cos)

/* The sum over the middle axis of x (before, n, after), in float64. */
static void folded(const double *x, double *y, long before, long n, long after) {
    long width = 1;
    while (width < n) width *= 2;
    double *part = malloc(width * sizeof *part);
    for (long b = 0; b < before; b++)
        for (long a = 0; a < after; a++) {
            for (long i = 0; i < width; i++) part[i] = i < n ? x[(b * n + i) * after + a] : 0;
            for (long h = width / 2; h; h /= 2)
                for (long i = 0; i < h; i++) part[i] = part[i] + part[i + h];
            y[b * after + a] = number(part[0]);
        }
    free(part);
}

void sum_float64(const double *x, double *y, long before, long n, long after) {
    folded(x, y, before, n, after);
}
