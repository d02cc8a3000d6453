# The configuration of nginx can't use environment variables, so this script replaces them. The argument is an option of
# `listen`.
conf=$SCRATCH/nginx-$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT.conf
sed "s|SCRATCH|$SCRATCH|; s|PORT|$PORT $1|; s|GENERATION|$REUSE_RUN_GENERATION|; s|SLOT|$REUSE_RUN_SLOT|" nginx.conf >"$conf"
exec nginx -e stderr -c "$conf"
