# The configuration of nginx can't use environment variables, so this script replaces them.
conf=$SCRATCH/nginx-$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT.conf
sed "s|SCRATCH|$SCRATCH|; s|PORT|$PORT|; s|GENERATION|$REUSE_RUN_GENERATION|; s|SLOT|$REUSE_RUN_SLOT|" nginx.conf >"$conf"
exec nginx -e stderr -c "$conf"
