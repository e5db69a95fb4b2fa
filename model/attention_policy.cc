#include "model/attention_policy.h"
