#include "model/prefill_engine.h"
