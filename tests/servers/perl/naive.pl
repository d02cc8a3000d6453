use strict;
use warnings;
use IO::Socket::INET;

$SIG{CHLD} = 'IGNORE';
my $server = IO::Socket::INET->new(LocalPort => $ENV{PORT}, Listen => SOMAXCONN, ReuseAddr => 1) or die $!;
while (my $client = $server->accept) {
    defined(my $child = fork) or die $!;
    if ($child == 0) {
        while (defined(my $line = <$client>)) { last if $line eq "\r\n" }
        my $body = "pid=$$ generation=$ENV{REUSE_RUN_GENERATION}\n";
        print $client "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: ", length $body, "\r\n\r\n$body";
        close $client;
        exit;
    }
    close $client;
}
