// The CPU kernels as one translation unit: a second one would parse ATen's headers again. Each file registers its own ops.
#include "attention.h"
#include "float.h"
#include "int8.h"
#include "kv_write.h"
#include "linear.h"
#include "paged_attention.h"
#include "rope_kv_write.h"
