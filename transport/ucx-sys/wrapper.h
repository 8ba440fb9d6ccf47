/* What regenerate.sh binds: the UCP API, and of UCS the function that names a status and the one that sets an option of
 * the whole library (exported since 1.0; its header, ucs/config/global_opts.h, is not installed). */
#include <ucp/api/ucp.h>
#include <ucs/type/status.h>
ucs_status_t ucs_global_opts_set_value(const char *name, const char *value);
