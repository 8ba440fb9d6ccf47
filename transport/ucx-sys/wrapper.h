/* What regenerate.sh binds: the UCP API and the one function of UCS that names its status codes. */
#include <ucp/api/ucp.h>
#include <ucs/type/status.h>
