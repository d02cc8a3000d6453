-module(server).
-export([start/0]).

%% A process for each connection, and some that accept. The one that listens has to live on.
start() ->
    spawn(fun listen/0).

listen() ->
    Port = list_to_integer(os:getenv("PORT")),
    Options = [binary, {packet, http_bin}, {active, false}, {reuseaddr, true}, {backlog, 1024}, {ip, {127, 0, 0, 1}}],
    {ok, Listener} = gen_tcp:listen(Port, Options),
    [spawn_link(fun() -> accept(Listener) end) || _ <- lists:seq(1, 4)],
    timer:sleep(infinity).

accept(Listener) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    spawn(fun() -> accept(Listener) end),
    serve(Socket).

serve(Socket) ->
    case gen_tcp:recv(Socket, 0) of
        {ok, {http_request, _, _, _}} ->
            Keeps = keeps(Socket, true),
            Body = ["pid=", os:getpid(), " generation=", os:getenv("REUSE_RUN_GENERATION"), "\n"],
            Length = integer_to_list(iolist_size(Body)),
            Close = case Keeps of true -> ""; false -> "Connection: close\r\n" end,
            ok = gen_tcp:send(Socket, ["HTTP/1.1 200 OK\r\nContent-Length: ", Length, "\r\n", Close, "\r\n", Body]),
            case Keeps of true -> serve(Socket); false -> gen_tcp:close(Socket) end;
        {error, _} ->
            gen_tcp:close(Socket)
    end.

%% Reads the rest of the head, and whether the connection stays open.
keeps(Socket, Keeps) ->
    case gen_tcp:recv(Socket, 0) of
        {ok, http_eoh} -> Keeps;
        {ok, {http_header, _, 'Connection', _, <<"close">>}} -> keeps(Socket, false);
        {ok, _} -> keeps(Socket, Keeps)
    end.
