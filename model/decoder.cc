#include "model/decoder.h"
